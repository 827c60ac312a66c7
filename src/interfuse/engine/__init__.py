"""Where plans run: this machine. `merge` is the public function, `local` runs a plan, `numbers` holds the formats."""
