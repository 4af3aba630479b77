"""The commands: each parses its options, calls one plain function, and hands the record to `report`."""
