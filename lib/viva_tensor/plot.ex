defmodule VivaTensor.Plot do
  @moduledoc """
  Scatter plots as SVG: one text that needs nothing else, light or dark as its viewer is.

      iex> points = [%{x: 4.5, y: 20.7, label: "nf4 rtn", series: "rtn", front: true}]
      iex> svg = VivaTensor.Plot.scatter(points, x: "bits per weight", y: "SQNR, dB")
      iex> IO.iodata_to_binary(svg) =~ "<svg"
      true
  """

  alias VivaTensor.Markup
  alias VivaTensor.Plot.Axis

  @width 960
  @height 600
  @left 72
  @right 24
  @top 76
  @bottom 56
  @radius 4.5

  # Of text of 11 pixels: what a label covers.
  @character 6.4
  @line 13
  # Where a label may be, from its point: the first place that is free is taken.
  @places [
    {9, 4, :start},
    {-9, 4, :end},
    {0, -10, :middle},
    {0, 19, :middle},
    {7, -7, :start},
    {-7, -7, :end},
    {7, 15, :start},
    {-7, 15, :end},
    {14, -18, :start},
    {-14, -18, :end},
    {14, 26, :start},
    {-14, 26, :end}
  ]

  # Told apart with any sight of colour: Okabe and Ito's, lighter on dark ground.
  @light ~w(#0072b2 #d55e00 #009e73 #a34e86 #8a6d00 #2b8cc4 #555555 #7a4bb0)
  @dark ~w(#5fb4e8 #ff9b54 #3fd0a5 #e59ac6 #e6c34a #9ad4f5 #bbbbbb #b99aea)

  @style """
  .viva-plot { --ground: #ffffff; --ink: #1c1e21; --faint: #6a7078; --grid: #e3e6ea; }
  .viva-plot text { font: 11px system-ui, sans-serif; fill: var(--ink); }
  .viva-plot .title { font-size: 15px; font-weight: 600; }
  .viva-plot .axis, .viva-plot .tick { fill: var(--faint); font-size: 12px; }
  .viva-plot .halo { paint-order: stroke; stroke: var(--ground); stroke-width: 3px; }
  .viva-plot .grid { stroke: var(--grid); }
  .viva-plot .front { fill: none; stroke: var(--faint); stroke-width: 1.5; stroke-dasharray: 5 4; }
  .viva-plot .best { font-weight: 600; }
  """

  @typedoc "`front: true` points are joined by a line, and their labels come first."
  @type point :: %{
          x: number,
          y: number,
          label: String.t(),
          series: String.t(),
          front: boolean
        }

  @doc """
  A scatter plot.

  Options: `title:`; `x:` and `y:`, what the axes are; `log:` whether y is logarithmic
  (`false`), where points at or below zero are left out; `front:` what the line says.
  A label that would cover another is not written: it shows where the pointer rests on
  its point, as every label does.
  """
  @spec scatter([point], keyword) :: iodata
  def scatter(points, options) do
    log? = Keyword.get(options, :log, false)
    points = Enum.filter(points, &(is_number(&1.y) and (not log? or &1.y > 0)))
    xs = axis(Enum.map(points, & &1.x), false, @left, @width - @right)
    ys = axis(Enum.map(points, & &1.y), log?, @height - @bottom, @top)
    series = points |> Enum.map(& &1.series) |> Enum.uniq() |> Enum.sort()
    # Room for the title, if there is one.
    top = if options[:title], do: 0, else: 30
    placed = for p <- points, do: Map.merge(p, %{cx: at(xs, p.x), cy: at(ys, p.y)})

    [
      ~s(<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 #{top} #{@width} #{@height - top}" ),
      ~s(class="viva-plot" role="img" aria-label="#{Markup.escape(options[:title] || "plot")}">\n),
      ["<style>\n", @style, colours(series), "</style>\n"],
      ~s(<rect width="#{@width}" height="#{@height}" fill="var(--ground\)"/>\n),
      text(@left, 28, :start, "title", options[:title] || ""),
      grid(xs, ys, options),
      legend(series, options[:front]),
      front(placed),
      for(p <- Enum.sort_by(placed, & &1.front), do: mark(p, series)),
      labels(placed),
      "</svg>\n"
    ]
  end

  # Axes

  # Over which pixels an axis goes.
  defp axis(values, log?, from, to), do: {Axis.new(values, log: log?), from, to}

  defp at({axis, from, to}, value) do
    Float.round(from + Axis.part(axis, value) * (to - from), 2)
  end

  defp grid(xs, ys, options) do
    {{%{ticks: x_ticks}, _, _}, {%{ticks: y_ticks}, _, _}} = {xs, ys}
    {middle, bottom} = {div(@left + @width - @right, 2), @height - @bottom}

    [
      for tick <- x_ticks, x = at(xs, tick) do
        [line(x, @top, x, bottom), text(x, bottom + 18, :middle, "tick", Axis.number(tick))]
      end,
      for tick <- y_ticks, y = at(ys, tick) do
        [
          line(@left, y, @width - @right, y),
          text(@left - 8, y + 4, :end, "tick", Axis.number(tick))
        ]
      end,
      text(middle, @height - 14, :middle, "axis", options[:x] || ""),
      ~s(<g transform="rotate(-90 18 #{div(@top + bottom, 2)}\)">),
      text(18, div(@top + bottom, 2), :middle, "axis", options[:y] || ""),
      "</g>\n"
    ]
  end

  defp line(x1, y1, x2, y2),
    do: ~s(<line class="grid" x1="#{x1}" y1="#{y1}" x2="#{x2}" y2="#{y2}"/>\n)

  # Points

  defp colours(series) do
    rules = fn colours ->
      for {_, index} <- Enum.with_index(series) do
        colour = Enum.at(colours, rem(index, length(colours)))
        ".viva-plot .s#{index} { fill: #{colour}; stroke: #{colour}; }\n"
      end
    end

    [
      rules.(@light),
      "@media screen and (prefers-color-scheme: dark) {\n",
      ".viva-plot { --ground: #16181c; --ink: #eceef1; --faint: #9aa1aa; --grid: #2b2f36; }\n",
      rules.(@dark),
      "}\n"
    ]
  end

  defp legend(series, front) do
    {items, x} =
      series
      |> Enum.with_index()
      |> Enum.map_reduce(@left + 5, fn {name, index}, x ->
        {[circle(x, 50, "s#{index}", 1), "</circle>\n", text(x + 10, 54, :start, "", name)],
         x + 34 + width(name)}
      end)

    line =
      if front do
        [
          ~s(<path class="front" d="M#{x} 50 h28"/>\n),
          text(x + 36, 54, :start, "", front)
        ]
      end

    [items, line || []]
  end

  defp front(points) do
    case points |> Enum.filter(& &1.front) |> Enum.sort_by(&{&1.cx, &1.cy}) do
      [_, _ | _] = all ->
        path = Enum.map_join(all, " L", &"#{&1.cx} #{&1.cy}")
        ~s(<path class="front" d="M#{path}"/>\n)

      _ ->
        []
    end
  end

  defp mark(point, series) do
    index = Enum.find_index(series, &(&1 == point.series))
    opacity = if point.front, do: 1, else: 0.45
    title = "#{point.label}: #{Axis.number(point.x)}, #{Axis.number(point.y)}"

    [
      circle(point.cx, point.cy, "mark s#{index}", opacity),
      "<title>#{Markup.escape(title)}</title></circle>\n"
    ]
  end

  defp circle(x, y, class, opacity) do
    ~s(<circle class="#{class}" cx="#{x}" cy="#{y}" r="#{@radius}" fill-opacity="#{opacity}">)
  end

  # Labels

  defp labels(points) do
    marks = for p <- points, do: {p.cx - 6, p.cy - 6, p.cx + 6, p.cy + 6}

    {texts, _taken} =
      points
      |> Enum.sort_by(&{not &1.front, &1.cx, &1.cy})
      |> Enum.flat_map_reduce(marks, fn point, taken ->
        case Enum.find_value(@places, &place(point, &1, taken)) do
          nil -> {[], taken}
          {{x, y, anchor}, box} -> {[label(point, x, y, anchor)], [box | taken]}
        end
      end)

    texts
  end

  defp place(point, {dx, dy, anchor}, taken) do
    {x, y} = {point.cx + dx, point.cy + dy}
    wide = width(point.label)

    left =
      case anchor do
        :start -> x
        :middle -> x - wide / 2
        :end -> x - wide
      end

    box = {left, y - @line + 3, left + wide, y + 3}
    inside? = left > @left and left + wide < @width - 4 and y - @line > @top - 12
    free? = not Enum.any?(taken, &overlap?(&1, box))
    if inside? and y < @height - @bottom and free?, do: {{x, y, anchor}, box}
  end

  defp overlap?({a, b, c, d}, {e, f, g, h}), do: a < g and e < c and b < h and f < d

  defp label(point, x, y, anchor) do
    class = if point.front, do: "halo best", else: "halo"
    text(Float.round(x / 1, 2), Float.round(y / 1, 2), anchor, class, point.label)
  end

  defp width(text), do: round(@character * String.length(text))

  defp text(x, y, anchor, class, text) do
    ~s(<text x="#{x}" y="#{y}" text-anchor="#{anchor}" class="#{class}">#{Markup.escape(text)}</text>\n)
  end
end
