"""The pull: resolve, plan, fetch, unpack, record, as the seed describes it."""
