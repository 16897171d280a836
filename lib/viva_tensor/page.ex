defmodule VivaTensor.Page do
  @moduledoc """
  The JSON of a job or of a comparison as one page of HTML, which needs nothing else:
  drawings are SVG, light or dark as its viewer is, and nothing is fetched.

      iex> {:ok, report} = VivaTensor.Native.json_decode(~s({
      ...>   "recipe": {"layout": "gguf"}, "source": "a", "target": "b", "files": [],
      ...>   "tensors": [], "input_bytes": 4, "output_bytes": 2, "seconds": 1.0,
      ...>   "bytes_per_second": 4.0
      ...> }))
      iex> {:ok, page} = VivaTensor.Page.render(report)
      iex> IO.iodata_to_binary(page) =~ "<h1>a → b</h1>"
      true
      iex> {:error, error} = VivaTensor.Page.render([])
      iex> error.message
      "this JSON is neither the report of a job (report.json) nor what mix viva.compare --json prints"
  """

  import VivaTensor.Markup, only: [element: 3, to_iodata: 1]

  alias VivaTensor.{Error, Markup}
  alias VivaTensor.Page.{Compare, Job, Parts, Vectors}

  # What a page is made of.
  @typedoc false
  @type page :: %{
          title: String.t(),
          lead: Markup.content(),
          sections: [Parts.section()],
          footer: Markup.content()
        }

  @kinds [Job, Vectors, Compare]

  for file <- ~w(page.css page.js) do
    @external_resource Path.join(__DIR__, "page/#{file}")
  end

  @style File.read!(Path.join(__DIR__, "page/page.css"))
  @script File.read!(Path.join(__DIR__, "page/page.js"))

  # Whatever a name may smuggle in, no other script runs and nothing is fetched.
  @policy "default-src 'none'; style-src 'unsafe-inline'; img-src data:; " <>
            "script-src 'sha256-#{Base.encode64(:crypto.hash(:sha256, @script))}'"

  @head ~s(<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="#{@policy}">
<link rel="icon" href="data:,">
)

  @doc "The page of what JSON holds. Other data is an error."
  @spec render(term) :: {:ok, iodata} | {:error, Error.t()}
  def render(data) do
    case Enum.find(@kinds, & &1.shows?(data)) do
      nil -> {:error, unknown()}
      kind -> {:ok, data |> kind.page() |> html()}
    end
  end

  defp unknown do
    Error.new(
      :source,
      {:invalid_file, %{message: "is not a report"}},
      "this JSON is neither the report of a job (report.json) nor what " <>
        "mix viva.compare --json prints"
    )
  end

  defp html(page) do
    sections = Enum.filter(page.sections, & &1)

    [
      ~s(<!DOCTYPE html>\n<html lang="en">\n<head>\n),
      @head,
      to_iodata(element("title", [], page.title)),
      ["<style>\n", @style, "</style>\n</head>\n<body>\n"],
      to_iodata([
        element("header", [], [element("h1", [], page.title), page.lead]),
        element("main", [], sections),
        element("footer", [], page.footer)
      ]),
      ["<script>", @script, "</script>\n</body>\n</html>\n"]
    ]
  end
end
