"""What goes over HTTP: request bodies (pydantic, validated) and response bodies (msgspec, encoded quickly)."""
