"""From a data source to tokenised examples on clients: :func:`fedloom.platform.data.prepare.prepare_data`."""
