"""The reason codes of the dead-letter tables, in the order in which they are checked."""

from enum import IntEnum


class Reason(IntEnum):
    """Why a message is not in Silver. The lower-case name is the value of the column `reason`; 0 is a valid trade.

    Defects of the payload come first: the first one in its bytes counts. Then come its values, in this order. The rules
    of an exchange come last, under their own names.
    """

    VALID = 0
    NULL_PAYLOAD = 1
    BAD_MAGIC = 2
    UNKNOWN_SCHEMA = 3
    TRUNCATED = 4
    MALFORMED = 5
    INVALID_ENUM = 6
    INVALID_UTF8 = 7
    TRAILING_BYTES = 8
    MESSAGE_ID_REQUIRED = 9
    SYMBOL_REQUIRED = 10
    TRADE_ID_REQUIRED = 11
    CURRENCY_REQUIRED = 12
    PRICE_MUST_BE_POSITIVE = 13
    QUANTITY_MUST_BE_POSITIVE = 14
    INVALID_SIDE = 15
    WRONG_EXCHANGE = 16
    INVALID_ASSET_CLASS = 17
    TIMESTAMP_OUT_OF_RANGE = 18
    TIMESTAMP_IN_FUTURE = 19
    TIMESTAMP_TOO_OLD = 20
    TIMESTAMP_IMPLAUSIBLE = 21
    INGESTION_TIMESTAMP_IMPLAUSIBLE = 22

    @property
    def code(self) -> str:
        """The value of the column `reason`."""
        return self.name.lower()


FIRST_EXCHANGE_RULE = 32  # the first number of an exchange's rules, which keep the order of their declaration
