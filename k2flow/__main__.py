"""`k2flow`, also `python -m k2flow`."""

from k2flow.errors import SettingsError


def main() -> None:
    """Runs the command line, once the settings can be imported: PyIceberg reads its configuration file then."""
    try:
        import k2flow.config.settings  # noqa: F401
    except SettingsError as error:
        raise SystemExit(f"k2flow: error: {error}") from None
    from k2flow.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
