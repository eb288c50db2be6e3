"""How the flows do, told from outside, from Kafka and the tables alone.

`observe` looks; `flows` and `tables` are pure functions of what it finds and of the time; `report` is what they tell.
"""
