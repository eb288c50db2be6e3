"""Decodes Avro records to Arrow columns, in whole batches and without I/O.

    schemas    parses and checks the writer's and the reader's schema; the Arrow type of each Avro type
    resolve    resolves both schemas into a plan
    plan       the nodes of a plan, one per type
    unions     the node of unions
    cursor     the read positions of all records in a buffer
    blocks     the items of arrays and maps
    columns    decoded values, and their conversion to Arrow arrays
    utf8       validation of UTF-8
    texts      values of any type as text
    defect_log the defects of a batch
    decoder    all of it, for a batch of payloads

Start at `decoder.AvroDecoder`.
"""
