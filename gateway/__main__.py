"""`farebox` and `python -m gateway`: the command line."""

import click

from gateway.cli import (
    accounts,
    audit,
    bench,
    demo,
    keys,
    operators,
    receipts,
    serve,
    settings,
    till,
    work,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="farebox", prog_name="farebox")
def main() -> None:
    """Farebox: a metering gateway for LLM APIs."""


main.add_command(demo.demo)
main.add_command(serve.serve)
main.add_command(serve.migrate)
main.add_command(work.work)
main.add_command(settings.check)
main.add_command(settings.config)
main.add_command(accounts.accounts)
main.add_command(accounts.credits)
main.add_command(keys.keys)
main.add_command(operators.operators)
main.add_command(receipts.receipts)
main.add_command(audit.audit)
main.add_command(till.till)
main.add_command(bench.bench)


if __name__ == "__main__":
    main()
