"""Tables, plots and page from the records that runs leave: `collate` > `formats` > `html` > `output`; no torch, no Hydra."""
