"""How a model is spread over processes. Each strategy also gives its training state in pieces, see `state`."""
