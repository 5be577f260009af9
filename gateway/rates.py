"""Prices of a config as rates of the price book. Apart from the catalog, which needs providers."""

from billing.money import rate_of_usd
from billing.prices import Rates
from config.settings import Price, Settings


def config_rates(settings: Settings) -> dict[str, Rates]:
    """The prices of a config, as the price book keeps them."""
    return {
        name: rates_of(model.price)
        for name, model in settings.models.items()
        if model.price is not None
    }


def rates_of(price: Price) -> Rates:
    """Rates in nanos; a kind without a price of its own costs what its total's kind costs."""
    input_rate = rate_of_usd(price.input_usd_per_mtok)
    output_rate = rate_of_usd(price.output_usd_per_mtok)

    def rate(usd: str | None, instead: int) -> int:
        return instead if usd is None else rate_of_usd(usd)

    audio_in, audio_out = price.audio_input_usd_per_mtok, price.audio_output_usd_per_mtok
    return Rates(
        input_rate=input_rate,
        output_rate=output_rate,
        cached_input_rate=rate(price.cached_input_usd_per_mtok, input_rate),
        cache_write_rate=rate(price.cache_write_usd_per_mtok, input_rate),
        reasoning_rate=rate(price.reasoning_usd_per_mtok, output_rate),
        audio_input_rate=None if audio_in is None else rate_of_usd(audio_in),
        audio_output_rate=None if audio_out is None else rate_of_usd(audio_out),
    )
