defmodule VivaTensor.CLI.Report do
  @moduledoc false
  # The work behind `mix viva.report`: JSON to a page.

  alias VivaTensor.{CLI, Error, Native, Page, Size}
  alias VivaTensor.Job.{FileError, ReportFiles, Unfinished}

  @behaviour CLI

  @task "viva.report"
  @switches [to: :string, force: :boolean, json: :boolean]

  @impl CLI
  def switches, do: @switches

  @doc """
  Reads the flags.

      iex> VivaTensor.CLI.Report.parse(["out", "--to", "out.html"])
      {:ok, [path: "out", to: "out.html"]}
  """
  @impl CLI
  @spec parse([String.t()]) :: {:ok, keyword} | :help | {:error, String.t()}
  def parse(argv) do
    case CLI.parse(argv, @switches) do
      {:ok, flags, [path]} -> {:ok, [path: path] ++ flags}
      {:ok, _flags, []} -> {:error, "which PATH?"}
      {:ok, _flags, [_, extra | _]} -> {:error, "one PATH at a time; what is #{inspect(extra)}?"}
      other -> other
    end
  end

  @doc "Writes the page. The application must be started."
  @impl CLI
  @spec run(keyword) :: CLI.exit_code()
  def run(flags) do
    path = file(flags[:path])
    to = flags[:to] || Path.rootname(path) <> ".html"

    with {:ok, json} <- path |> File.read() |> FileError.wrap(:source, path),
         {:ok, data} <- json |> Native.json_decode() |> Error.wrap(:source),
         {:ok, page} <- Page.render(data),
         :ok <- absent(to, flags[:force]),
         :ok <- write(to, page) do
      bytes = IO.iodata_length(page)

      if flags[:json],
        do: IO.puts(CLI.json(%{page: to, bytes: bytes})),
        else: IO.puts("#{to}: #{Size.format(bytes)}")

      0
    else
      {:error, error} -> CLI.failure(@task, error, flags)
    end
  end

  @doc "The report of a job, by its output, or by the unfinished one of a job that put tensors aside."
  @spec file(Path.t()) :: Path.t()
  def file(path) do
    if File.regular?(path) do
      path
    else
      places = [path | for({:ok, unfinished} <- [Unfinished.of(path)], do: unfinished.directory)]
      paths = for place <- places, do: Path.join(place, ReportFiles.json())
      Enum.find(paths, hd(paths), &File.exists?/1)
    end
  end

  defp absent(to, force) do
    if File.exists?(to) and not (force == true) do
      message = "#{to} exists; --force replaces it, --to names another file"
      {:error, Error.new(:output, {:io, %{path: to, code: "eexist", message: message}}, message)}
    else
      :ok
    end
  end

  # Complete and synced before it has its name.
  defp write(to, page) do
    partial = Path.join(Path.dirname(to), ".#{Path.basename(to)}.partial")

    with :ok <- partial |> File.write(page, [:sync]) |> FileError.wrap(:output, to),
         do: partial |> File.rename(to) |> FileError.wrap(:output, to)
  end
end
