"""`farebox` and `python -m gateway`: the command line."""

import click

from gateway.cli import (
    accounts,
    audit,
    bench,
    demo,
    grants,
    keys,
    operators,
    payments,
    receipts,
    serve,
    settings,
    system,
    till,
    upstream,
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
accounts.accounts.add_command(system.system)
main.add_command(keys.keys)
for each in upstream.COMMANDS:
    keys.keys.add_command(each)
main.add_command(grants.grants)
main.add_command(operators.operators)
main.add_command(payments.payments)
main.add_command(receipts.receipts)
main.add_command(audit.audit)
main.add_command(till.till)
main.add_command(bench.bench)


if __name__ == "__main__":
    main()
