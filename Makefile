# Each target is complete by itself: bin/setup finds or installs what it needs.

export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH)
export LANG ?= C.UTF-8

.PHONY: help setup deps demo test check lint dialyzer docs bench formats matrix aarch64 oracle mutations faults clean
.NOTPARALLEL:

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install or name the tools that are missing
	@bin/setup

demo: deps ## Compress the bundled model and print the report
	bin/demo

# A NIF library is linked against the VM that loads it, so that its tests are in Elixir.
test: deps ## Run every Rust and Elixir test
	cargo test --workspace --exclude viva_nif --locked
	mix test

check: lint test dialyzer docs ## Run every gate: lint, tests, Dialyzer, documentation

lint: deps ## Check formatting and deny warnings
	@bin/setup --check
	cargo fmt --all --check
	mix format --check-formatted
	cargo clippy --workspace --all-targets --locked -- -D warnings
	mix compile --warnings-as-errors --force

dialyzer: deps ## Check the specs
	@bin/setup --check
	bin/dialyzer

docs: deps ## Build the documentation into doc/ and target/doc (needs root)
	@bin/setup --check
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
	bin/docs

bench: deps ## Time every kernel, method and limit of the machine
	cargo bench -p viva_core --locked --benches

formats: deps ## Measure the tables of docs/formats.md afresh
	mix run -r bench/formats_table.exs -e 'FormatsTable.write()'

matrix: deps ## Run the Elixir tests on the Elixir of Debian trixie and sid (needs root)
	@bin/setup --roots
	bin/matrix

aarch64: setup ## Run the Rust tests of the core on an emulated aarch64 (needs root)
	@bin/setup --roots
	bin/aarch64

oracle: deps ## Hold quantized models to bitsandbytes and AWQ (needs PyPI, 5 GB)
	test/oracle/run

mutations: deps ## Open 100,000 damaged files of each kind
	VIVA_TENSOR_MUTATIONS=100000 cargo test -p viva_core --locked --test gguf_mutations --test safetensors_mutations

faults: deps ## Kill jobs at every sync and at random moments, and lose nothing
	MIX_ENV=test mix run test/faults/run.exs

clean: ## Remove everything that was built
	rm -rf _build deps doc demo priv/native target

# Without Hex there are none, and this neither asks nor connects.
deps: setup
	@mix deps.get >/dev/null
