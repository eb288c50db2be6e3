"""Decodes Avro records to Arrow columns, in whole batches and without I/O.

    schemas    parses and checks the writer's and the reader's schema
    resolve    resolves both schemas into a plan
    plan       the nodes of a plan, one per type
    unions     the nodes of unions
    types      the Arrow type of each Avro type
    defaults   the values of fields that only the reader's schema has
    cursor     the read positions of all records in a buffer
    blocks     the items of arrays and maps
    decimals   big-endian two's complement numbers
    columns    decoded values, and their conversion to Arrow arrays
    maps       duplicate keys of maps
    utf8       validation of UTF-8
    unknown    fields that only the writer's schema has
    texts      values of any type as text
    defect_log the defects of a batch
    decoder    all of it, for a batch of payloads

Start at `decoder.AvroDecoder`.
"""
