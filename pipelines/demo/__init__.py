"""The page of `dittune demo`. Needs the extra `demo`: nothing else of dittune imports gradio."""
