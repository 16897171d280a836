defmodule VivaTensor.Page.Job do
  @moduledoc false
  # The page of a job's report: what `report.json` holds, in pictures.

  import VivaTensor.Markup, only: [element: 2, element: 3]
  import VivaTensor.Page.Parts

  alias VivaTensor.Page.{Quality, Sizes, Timeline}

  # Rows of the table: a page of more is slow in any browser.
  @most_rows 5_000

  @doc "Whether data is the report of a job."
  @spec shows?(term) :: boolean
  def shows?(%{"recipe" => %{}, "files" => files, "tensors" => tensors} = data)
      when is_list(files) and is_list(tensors) do
    Enum.all?(~w(input_bytes output_bytes), &is_integer(data[&1])) and
      is_number(data["seconds"]) and is_number(data["bytes_per_second"]) and
      Enum.all?(tensors, &row?/1)
  end

  def shows?(_data), do: false

  defp row?(%{"name" => name, "input_bytes" => a, "output_bytes" => b} = row),
    do: is_binary(name) and is_integer(a) and is_integer(b) and is_binary(row["action"])

  defp row?(_other), do: false

  @doc "Its title, and its sections."
  @spec page(map) :: VivaTensor.Page.page()
  def page(report) do
    rows = report["tensors"]

    ids =
      for {row, index} <- Enum.with_index(Enum.take(rows, @most_rows)),
          into: %{},
          do: {row["name"], "t#{index}"}

    href = fn row -> ids[row["name"]] && "##{ids[row["name"]]}" end
    aside = list(report["quarantined"])

    %{
      title: title(report),
      lead: [
        element("p", [class: "lead"], about(report["recipe"])),
        if(aside != [],
          do:
            element("p", [class: "warning"], [
              element("strong", [], "Partial: "),
              "#{plural(length(aside), "tensor")} could not be done; nothing was published."
            ])
        )
      ],
      sections: [
        overview(report),
        put_aside(aside),
        Sizes.section(rows),
        Quality.section(rows, href),
        Timeline.section(rows, report["seconds"], href),
        kept(rows),
        every_tensor(rows, ids)
      ],
      footer: origin(report)
    }
  end

  defp list(list) when is_list(list), do: Enum.filter(list, &is_map/1)
  defp list(_other), do: []

  defp about(recipe) do
    settings = if is_map(recipe["settings"]), do: recipe["settings"], else: %{}

    words =
      for {key, value} <- settings |> Map.merge(Map.take(recipe, ["dtype"])) |> Enum.sort(),
          value not in [nil, false],
          do: if(value == true, do: key, else: "#{key} #{text(value)}")

    format = recipe["format"] && "#{text(recipe["format"])} in "
    Enum.join(["#{format}#{text(recipe["layout"])} layout" | words], ", ")
  end

  # At a glance

  defp overview(report) do
    {before, now} = {report["input_bytes"], report["output_bytes"]}

    section("overview", "At a glance", nil, [
      tiles([
        {"On disk before", size(before), nil},
        {"On disk after", size(now), change(before, now)},
        bits(report["bits_per_weight"]),
        sqnr(report["sqnr_db"], report["worst"]),
        lossless(report["lossless"]),
        tensors(report),
        duration(report)
      ]),
      whole(before, now)
    ])
  end

  defp bits(bits) when is_number(bits),
    do: {"Bits per weight", decimals(bits, 3), "quantized tensors"}

  defp bits(_none), do: nil

  defp sqnr(sqnr, worst) when is_number(sqnr),
    do: {"SQNR", [decimals(sqnr, 2), " dB"], lowest(worst)}

  defp sqnr(_none, _worst), do: nil

  defp lossless(count) when is_integer(count),
    do: {"Lossless", count(count), "of the converted tensors"}

  defp lossless(_none), do: nil

  defp tensors(%{"quantized" => quantized, "kept" => kept})
       when is_integer(quantized) and is_integer(kept) do
    about = "#{count(quantized)} quantized, #{count(kept)} kept"
    {"Tensors", count(quantized + kept), about}
  end

  defp tensors(_report), do: nil

  defp lowest(%{"sqnr_db" => lowest}) when is_number(lowest),
    do: "lowest #{decimals(lowest, 2)} dB"

  defp lowest(_worst), do: nil

  defp whole(before, now) do
    widest = max(max(before, now), 1)

    drawing(14, [
      element("rect", class: "before", width: percent(before / widest), height: 14, rx: 3),
      element("rect", class: "quantized", width: percent(now / widest), height: 14, rx: 3)
    ])
  end

  # Tensors

  defp put_aside([]), do: nil

  defp put_aside(aside) do
    columns = [{"tensor", :text}, {"reason", :long}, {"attempts", :number}]

    rows =
      for row <- aside,
          do: {[], [code(text(row["name"])), text(row["reason"]), text(row["attempts"])]}

    section("aside", "Put aside", "Tensors that no attempt could do.", [
      table("Tensors that were put aside", columns, rows)
    ])
  end

  defp kept(rows) do
    by_reason = rows |> Enum.filter(&(&1["action"] == "keep")) |> Enum.group_by(& &1["reason"])
    columns = [{"reason", :text}, {"tensors", :number}, {"bytes", :number}]

    rows =
      for {reason, rows} <- Enum.sort_by(by_reason, fn {_, rows} -> -bytes(rows) end),
          do: {[], [text(reason || "not quantized"), count(length(rows)), size(bytes(rows))]}

    if rows != [] do
      section("kept", "Kept as they were", nil, table("Kept tensors, by reason", columns, rows))
    end
  end

  defp bytes(rows), do: rows |> Enum.map(& &1["output_bytes"]) |> Enum.sum()

  defp every_tensor(rows, ids) do
    shown = Enum.take(rows, @most_rows)

    note =
      if length(rows) > @most_rows,
        do: "The first #{count(@most_rows)} of #{count(length(rows))}; report.json has all."

    columns = [
      {"tensor", :text},
      {"dtype", :text},
      {"shape", :text},
      {"stored as", :text},
      {"before", :number},
      {"after", :number},
      {"bits/w", :number},
      {"SQNR dB", :number},
      {"time", :number}
    ]

    section("tensors", "Every tensor", note, [
      table("Every tensor", columns, for(row <- shown, do: {[id: ids[row["name"]]], cells(row)}))
    ])
  end

  defp cells(row) do
    [
      code(row["name"]),
      [row["from"] && "#{text(row["from"])} ", text(row["dtype"])],
      row["shape"] |> List.wrap() |> Enum.map_join("×", &text/1),
      stored_as(row),
      size(row["input_bytes"]),
      size(row["output_bytes"]),
      decimals(row["bits_per_weight"], 3),
      if(row["lossless"] == true, do: "lossless", else: decimals(row["sqnr_db"], 2)),
      if(is_number(row["began"]) and is_number(row["ended"]),
        do: time(row["ended"] - row["began"])
      )
    ]
  end

  defp stored_as(%{"action" => "keep", "reason" => reason}) when is_binary(reason),
    do: "kept: #{reason}"

  defp stored_as(%{"action" => "keep"}), do: "kept"
  defp stored_as(%{"format" => format, "reason" => nil}), do: text(format)

  defp stored_as(%{"format" => format, "reason" => reason}),
    do: "#{text(format)}: #{text(reason)}"

  defp stored_as(row), do: row["action"]
end
