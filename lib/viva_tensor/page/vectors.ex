defmodule VivaTensor.Page.Vectors do
  @moduledoc false
  # The page of a job that compressed vectors: how small they became, and how many of the
  # nearest a search in them still finds.

  import VivaTensor.Markup, only: [element: 2, element: 3]
  import VivaTensor.Page.Parts

  @searches [
    {"codes", "by codes alone"},
    {"rescored", "by codes, the best scored again"},
    {"hamming", "binary queries"},
    {"hamming_rescored", "binary queries, the best scored again"}
  ]

  @doc "Whether data is the report of such a job."
  @spec shows?(term) :: boolean
  def shows?(%{"recipe" => %{"codes" => codes}, "files" => files} = report) when is_list(files) do
    is_binary(codes) and Enum.all?(files, &file?/1) and
      Enum.all?(~w(vectors dimension input_bytes output_bytes codes_bytes), &count?(report[&1])) and
      is_number(report["seconds"]) and is_number(report["bytes_per_second"])
  end

  def shows?(_data), do: false

  defp file?(%{"name" => name, "bytes" => bytes}), do: is_binary(name) and count?(bytes)
  defp file?(_other), do: false

  defp count?(number), do: is_integer(number) and number >= 0

  @doc "Its title, and its sections."
  @spec page(map) :: VivaTensor.Page.page()
  def page(report) do
    %{
      title: title(report),
      lead: element("p", [class: "lead"], about(report)),
      sections: [overview(report), recall(report["recall"]), files(report)],
      footer: origin(report)
    }
  end

  defp about(%{"recipe" => recipe}) do
    again =
      if recipe["rescore"] not in [nil, "none"],
        do: ", scored again by #{text(recipe["rescore"])}"

    "#{recipe["codes"]} codes#{again}, #{text(recipe["metric"])}"
  end

  defp overview(report) do
    {before, codes} = {report["input_bytes"], report["codes_bytes"]}
    dimension = "of #{count(report["dimension"])} #{text(report["dtype"])}"

    section("overview", "At a glance", nil, [
      tiles([
        {"Vectors", count(report["vectors"]), dimension},
        {"Before", size(before), nil},
        {"Codes", size(codes), change(before, codes)},
        {"All files", size(report["output_bytes"]), change(before, report["output_bytes"])},
        duration(report)
      ])
    ])
  end

  defp recall(%{} = recall) do
    found = for {key, name} <- @searches, part = recall[key], part?(part), do: {name, part}

    about =
      "How many of the #{text(recall["nearest"])} nearest, by exact scores, searches of " <>
        "#{text(recall["queries"])} queries find; scored again are the " <>
        "#{text(recall["candidates"])} best."

    if found != [] do
      section("recall", "Recall", about, [
        plot("Recall of searches", rows(Enum.map(found, &search/1)))
      ])
    end
  end

  defp recall(_none), do: nil

  defp part?(part), do: is_number(part) and part >= 0 and part <= 1

  defp search({name, part}) do
    figure = decimals(part, 4)
    {name, bar("#{name}: #{figure}", part, 1), figure}
  end

  defp files(%{"files" => files, "input_bytes" => before}) do
    widest = Enum.max([before, 1 | Enum.map(files, & &1["bytes"])])
    vectors = {"vectors", bar("vectors: #{size(before)}", before, widest), size(before)}

    written =
      for %{"name" => name, "bytes" => bytes} <- files do
        name = Path.rootname(name)
        {name, bar("#{name}: #{size(bytes)}", bytes, widest), size(bytes)}
      end

    section("sizes", "Size of each part", "Bytes of the vectors, and of what was written.", [
      plot("Size of each part", rows([vectors | written]))
    ])
  end

  defp bar(title, part, whole) do
    shape = [
      element("rect", class: "before", width: "100%", height: 14, rx: 2),
      element("rect", class: "quantized", width: percent(part / whole), height: 14, rx: 2)
    ]

    drawing(14, mark(title, nil, shape))
  end
end
