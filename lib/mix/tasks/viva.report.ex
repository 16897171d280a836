defmodule Mix.Tasks.Viva.Report do
  @shortdoc "Draws the report of a job, or a comparison, as a page"

  @moduledoc """
  Draws what a job did, or how formats compare, as one page of HTML.

      mix viva.report PATH [--to FILE.html] [--force] [--json]

  PATH is a directory that a job wrote, its `report.json`, or a file with what
  `mix viva.compare --json` printed. The page needs nothing else: it can be
  mailed, printed, and read in light or dark. A job writes `report.html` into its
  output by itself.

  ## Flags

    * `--to FILE.html` - where to write; if not given, beside the JSON
    * `--force` - replace FILE.html if it exists
    * `--json` - print the page's path and size as JSON

  ## Examples

      mix viva.report viva-tiny-nf4 --to viva-tiny-nf4.html
      mix viva.compare examples/models/viva-tiny --json > compared.json
      mix viva.report compared.json

  ## Exit codes

    * 0 - done
    * 2 - wrong usage
    * 3 - PATH cannot be read, or is not what it claims to be
    * 4 - FILE.html exists, or cannot be written
  """

  use Mix.Task

  alias VivaTensor.CLI

  @impl Mix.Task
  def run(argv), do: CLI.main("viva.report", CLI.Report, argv)
end
