defmodule VivaTensor.Job.ReportFiles do
  @moduledoc false
  # The report of a job in its output: as JSON, and as a page of that.

  alias VivaTensor.{Error, Native, Page}

  @json "report.json"
  @page "report.html"

  @doc "The names of both."
  @spec names() :: [String.t()]
  def names, do: [@json, @page]

  @doc "The name of the JSON."
  @spec json() :: String.t()
  def json, do: @json

  @doc "Writes both of a report that is plain data."
  @spec write(reference, map) :: :ok | {:error, Error.t()}
  def write(output, report) do
    with {:ok, json} <- report |> Native.json_encode(true) |> Error.wrap(:output),
         {:ok, _} <- output |> Native.output_write(@json, json) |> Error.wrap(:output),
         # The page is of the file, as `mix viva.report` draws it again.
         {:ok, data} <- json |> Native.json_decode() |> Error.wrap(:output),
         {:ok, page} <- Page.render(data),
         page = IO.iodata_to_binary(page),
         {:ok, _} <- output |> Native.output_write(@page, page) |> Error.wrap(:output),
         do: :ok
  end
end
