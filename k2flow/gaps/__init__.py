"""Holes in the trade ids of exchanges that number the trades of each symbol without holes.

`runs` turns ids into runs of consecutive ids, and runs into holes, as SQL. `find` applies it to Gold, `gold` opens Gold
at one snapshot in bounded memory, `recent` follows the newest hours, and `metrics` exports their holes.
"""
