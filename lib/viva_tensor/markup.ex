defmodule VivaTensor.Markup do
  @moduledoc false
  # Elements of HTML and SVG. Text is escaped wherever it stands, so that no name of a
  # tensor can be anything but text.

  @entities %{"&" => "&amp;", "<" => "&lt;", ">" => "&gt;", "\"" => "&quot;"}

  @typedoc "What is escaped already."
  @type element :: {:markup, iodata}

  @typedoc "What an element may hold. `nil` is nothing."
  @type content :: element | String.t() | number | nil | [content]

  @doc """
  An element. Attributes that are `nil` are left out.

      iex> alias VivaTensor.Markup
      iex> Markup.element("td", [class: "name"], "<script>") |> Markup.to_iodata() |> IO.iodata_to_binary()
      ~s(<td class="name">&lt;script&gt;</td>)
  """
  @spec element(String.t(), [{atom | String.t(), String.t() | number | nil}], content) :: element
  def element(name, attributes \\ [], content \\ nil) do
    {:markup,
     [?<, name, attributes(attributes), ?>, to_iodata(content), "</", name, ?>, line(name)]}
  end

  # Around these, white space means nothing.
  defp line(name) when name in ~w(section header main footer tr li div p), do: "\n"
  defp line(_name), do: []

  defp attributes(attributes) do
    for {key, value} <- attributes, value != nil do
      [?\s, to_string(key), "=\"", value |> to_string() |> escape(), ?"]
    end
  end

  @doc "Text that is markup as it is."
  @spec raw(iodata) :: element
  def raw(iodata), do: {:markup, iodata}

  @doc "Content as it is written."
  @spec to_iodata(content) :: iodata
  def to_iodata(nil), do: []
  def to_iodata({:markup, iodata}), do: iodata
  def to_iodata(text) when is_binary(text), do: escape(text)
  def to_iodata(number) when is_number(number), do: to_string(number)
  def to_iodata(list) when is_list(list), do: Enum.map(list, &to_iodata/1)

  @doc """
  Text whose signs mean nothing in HTML or SVG, in an element or an attribute.

      iex> VivaTensor.Markup.escape(~s(a < b & "c"))
      "a &lt; b &amp; &quot;c&quot;"
  """
  @spec escape(String.t()) :: String.t()
  def escape(text), do: String.replace(text, ["&", "<", ">", "\""], &Map.fetch!(@entities, &1))
end
