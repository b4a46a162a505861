"""What `gptkern check`, `bench` and `tune` and the files in bench/ measure with; docs/design.md, section 8."""
