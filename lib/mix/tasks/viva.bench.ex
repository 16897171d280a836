defmodule Mix.Tasks.Viva.Bench do
  @shortdoc "Measures what the library promises"

  @moduledoc """
  Measures what the library promises.

      mix viva.bench quality [--json]
      mix viva.bench ops [--json]
      mix viva.bench peers [--venv DIR] [--rows REGEX] [--repeats N] [--threads N] [--json]

  ## Subcommands

    * `quality` - the SQNR and the bits per weight of every format and method on
      4096 x 4096 normal numbers, each beside the bar that it must reach and beside
      what the format's reference program makes of the same numbers; then the
      errors by which bitsandbytes and ggml test their own formats. A minute or two.

    * `ops` - what quantizing, dequantizing and multiplying with 1, 8 and 512 rows
      reach from Elixir, for every format: medians of calls. A few minutes.

    * `peers` - the same operations beside bitsandbytes, onnxruntime, OpenVINO, torch,
      ggml and candle, and beside what the machine's memory and arithmetic can do, in
      one run: `bench/peers/ops.py`, which needs python3 and cargo. It says which of
      them are absent. Half an hour.

  The figures of `quality` are measured by the run. The bars are in
  `bench/quality_bars.json`. The figures of other programs are in
  `bench/results/reference_quality.json`, with their versions, as
  `test/oracle/reference_quality.py` measured them.

  ## Flags

    * `--json` - `quality` and `ops` print the rows as JSON; `peers` writes
      `bench/results/ops.json`

  Of `peers`:

    * `--venv DIR` - the virtual environment of the other programs; it is made, and they
      are installed, where there is none. Without it, those that python3 finds
    * `--rows REGEX` - only the rows whose names it finds
    * `--repeats N` - how often each is asked; the table has the medians. 5
    * `--threads N` - for every program. 1

  ## Examples

      mix viva.bench quality
      mix viva.bench ops --json
      mix viva.bench peers --venv ~/peers --rows 'nf4' --repeats 2

  ## Exit codes

    * 0 - measured, and of `quality`: every bar is reached
    * 1 - a bar is missed; the peers could not be run
    * 2 - wrong usage
  """

  use Mix.Task

  alias VivaTensor.CLI

  @impl Mix.Task
  def run(argv), do: CLI.main("viva.bench", CLI.Bench, argv)
end
