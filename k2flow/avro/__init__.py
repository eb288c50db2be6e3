"""Decodes Avro records to Arrow columns, in whole batches and without I/O.

    parse      parses schemas, and finds the types that can be no column
    schemas    logical types; the Arrow type of each Avro type
    resolve    resolves the writer's and the reader's schema into a plan
    accepted   which types of a writer become a decimal or a time
    defaults   the default values of the reader's fields
    plan       the nodes of a plan, one per type
    unions     the node of unions
    decimals   the nodes of decimals: from bytes, integers and text
    times      the node of times in milliseconds
    skip       the node of values that are left out
    cursor     the read positions of all records in a buffer
    blocks     the items of arrays and maps
    columns    decoded values, and their conversion to Arrow arrays
    utf8       validation of UTF-8
    texts      values of any type as text
    defect_log the defects of a batch
    decoder    all of it, for a batch of payloads

Start at `decoder.AvroDecoder`.
"""
