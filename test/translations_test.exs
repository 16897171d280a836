defmodule VivaTensor.TranslationsTest do
  use ExUnit.Case, async: true

  alias VivaTensor.Test.Examples

  @pages for path <- ["README.zh-CN.md" | Path.wildcard("docs/**/*.zh-CN.md")],
             do: {path, String.replace(path, ".zh-CN.md", ".md")}

  # What is said to people differs, comments too.
  defp without_comments(code), do: Regex.replace(~r/(^|\s+)# .*$/m, code, "")

  defp fenced(page) do
    for {language, code, _line} <- Examples.blocks(page), do: {language, without_comments(code)}
  end

  # Outside of fences.
  defp text(page), do: Regex.replace(~r/^```.*?^```$/ms, File.read!(page), "")

  defp indented(page) do
    for [line] <- Regex.scan(~r/^    .+$/m, text(page)), do: without_comments(line)
  end

  # For each row of each table how many cells it has, code and figures.
  defp tables(page) do
    for [row] <- Regex.scan(~r/^\|.*\|$/m, text(page)) do
      {row |> String.split("|") |> length(), scan(~r/`[^`]+`/, row), scan(~r/\d[\d.]*/, row)}
    end
  end

  defp scan(regex, text), do: for([found] <- Regex.scan(regex, text), do: found)

  defp headings(page), do: scan(~r/^#+(?= )/m, text(page))

  # Which page of a language is linked to is its own affair.
  defp links(page) do
    for [_, target] <- Regex.scan(~r/\]\(([^)]+)\)/, text(page)),
        target = String.replace(target, ".zh-CN.md", ".md"),
        target not in ["README.md", "getting-started.md"],
        uniq: true,
        do: target
  end

  test "the README and getting started are there in Simplified Chinese" do
    assert Enum.map(@pages, &elem(&1, 0)) |> Enum.sort() ==
             ["README.zh-CN.md", "docs/guides/getting-started.zh-CN.md"]
  end

  for {translated, original} <- @pages do
    @translated translated
    @original original

    describe translated do
      test "shows the code and commands of #{original}" do
        assert [_ | _] = fenced(@original)
        assert fenced(@translated) == fenced(@original)
        assert indented(@translated) == indented(@original)
      end

      test "has the tables and figures of #{original}" do
        assert tables(@translated) == tables(@original)
      end

      test "has the sections and links of #{original}" do
        assert headings(@translated) == headings(@original)
        assert Enum.sort(links(@translated)) == Enum.sort(links(@original))
      end
    end
  end
end
