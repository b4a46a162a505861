"""gptkern inside other libraries, in their own words. Nothing here is imported by `import gptkern`."""
