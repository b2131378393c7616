"""Videos on disk, in shards or on the Hub, and the clips that a model is trained and tested on."""
