"""`k2flow config`."""

from rich.table import Table

from k2flow.cli.output import console
from k2flow.cli.reference import markdown
from k2flow.config.settings import PREFIX, load_settings, mask, origins, property_origins
from k2flow.exchange import all_exchanges, exchange_names
from k2flow.iceberg.catalog import configured, default_properties


def print_reference() -> None:
    """Print docs/configuration.md."""
    print(markdown(all_exchanges()), end="")


def show_settings() -> None:
    """Show every setting, its value and its source. Secrets are masked."""
    settings = load_settings(exchange_names())
    table = Table("setting", "value", "from")
    for origin in [*origins(settings, PREFIX, {}, ""), *property_origins(settings)]:
        table.add_row(origin.name, origin.value, origin.source)
    catalog, source = configured(settings), "PyIceberg's configuration"
    if not catalog:
        catalog, source = default_properties(settings.home), f"default, under {PREFIX}HOME"
    for key, value in sorted(catalog.items()):
        table.add_row(f"catalog {key}", mask(key, value), source)
    for exchange in all_exchanges():
        prefix, declared_in = f"{PREFIX}{exchange.name.upper()}_", f"flows/{exchange.name}.py"
        for origin in origins(exchange.settings, prefix, exchange.declared, declared_in):
            table.add_row(origin.name, origin.value, origin.source)
    console().print(table)
