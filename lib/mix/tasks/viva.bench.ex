defmodule Mix.Tasks.Viva.Bench do
  @shortdoc "Measures what the library promises"

  @moduledoc """
  Measures what the library promises.

      mix viva.bench quality [--json]

  ## Subcommands

    * `quality` - the SQNR and the bits per weight of every format and method on
      4096 x 4096 normal numbers, each beside the bar that it must reach and beside
      what the format's reference program makes of the same numbers; then the
      errors by which bitsandbytes and ggml test their own formats. A minute or two.

  Our figures are measured by the run. The bars are in `bench/quality_bars.json`.
  The figures of other programs are in `bench/results/reference_quality.json`, with
  their versions, as `test/oracle/reference_quality.py` measured them.

  ## Flags

    * `--json` - print the rows as JSON

  ## Exit codes

    * 0 - every bar is reached
    * 1 - one is missed
    * 2 - wrong usage
  """

  use Mix.Task

  alias VivaTensor.CLI

  @impl Mix.Task
  def run(argv) do
    code =
      case CLI.Bench.parse(argv) do
        {:ok, command} ->
          Mix.Task.run("app.start")
          CLI.Bench.run(command)

        :help ->
          Mix.Task.rerun("help", ["viva.bench"])
          0

        {:error, message} ->
          CLI.usage_error("viva.bench", message)
      end

    if code != 0, do: exit({:shutdown, code})
  end
end
