"""Avro records into Arrow columns, in whole batches, without I/O.

    schemas    writer and reader schema, parsed and checked
    resolve    both schemas into a plan
    plan       what to read for each type: the nodes of a plan
    unions     the nodes of unions
    types      the Arrow type of each Avro type
    defaults   the values of fields that only the reader's schema has
    cursor     one read position for each record: varints and byte spans, all records side by side
    blocks     the items of arrays and maps
    decimals   big-endian two's complement numbers
    columns    what was read, and how it becomes Arrow arrays
    utf8       which texts are no UTF-8
    unknown    fields that only the writer's schema has
    texts      values of any type as text
    defects    what can be wrong with a record
    decoder    all of it, for a batch of payloads

Start at `decoder.AvroDecoder`.
"""
