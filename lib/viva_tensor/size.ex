defmodule VivaTensor.Size do
  @moduledoc """
  Byte sizes as people write them.

  `KB`, `MB`, `GB` and `TB` are powers of 1000, as disks and Hugging Face count
  them; `KiB`, `MiB`, `GiB` and `TiB` are powers of 1024.
  """

  @units %{
    "" => 1,
    "b" => 1,
    "k" => 1_000,
    "kb" => 1_000,
    "kib" => 1_024,
    "m" => 1_000_000,
    "mb" => 1_000_000,
    "mib" => 1_048_576,
    "g" => 1_000_000_000,
    "gb" => 1_000_000_000,
    "gib" => 1_073_741_824,
    "t" => 1_000_000_000_000,
    "tb" => 1_000_000_000_000,
    "tib" => 1_099_511_627_776
  }

  @doc """
  Reads a size: a positive integer of bytes, or a number with a unit.

      iex> VivaTensor.Size.parse("2GB")
      {:ok, 2_000_000_000}
      iex> VivaTensor.Size.parse("1.5 MiB")
      {:ok, 1_572_864}
      iex> VivaTensor.Size.parse(4096)
      {:ok, 4096}
      iex> VivaTensor.Size.parse("many")
      {:error, ~s(expected a size such as "2GB", "512MiB" or a number of bytes, got "many")}
  """
  @spec parse(term) :: {:ok, pos_integer} | {:error, String.t()}
  def parse(size) when is_integer(size) and size > 0, do: {:ok, size}

  def parse(size) when is_binary(size) do
    with {number, rest} when number > 0 <- Float.parse(String.trim(size)),
         unit = rest |> String.trim() |> String.downcase(),
         {:ok, factor} <- Map.fetch(@units, unit),
         bytes when bytes > 0 <- trunc(number * factor) do
      {:ok, bytes}
    else
      _ -> invalid(size)
    end
  end

  def parse(size), do: invalid(size)

  defp invalid(size) do
    {:error,
     ~s(expected a size such as "2GB", "512MiB" or a number of bytes, got ) <> inspect(size)}
  end

  @doc """
  Writes a size for people.

      iex> VivaTensor.Size.format(2_888_296)
      "2.89 MB"
      iex> VivaTensor.Size.format(512)
      "512 B"
  """
  @spec format(non_neg_integer) :: String.t()
  def format(bytes) when bytes < 1_000, do: "#{bytes} B"
  def format(bytes) when bytes < 999_950, do: scaled(bytes / 1.0e3, 1, "kB")
  def format(bytes) when bytes < 999_995_000, do: scaled(bytes / 1.0e6, 2, "MB")
  def format(bytes), do: scaled(bytes / 1.0e9, 2, "GB")

  defp scaled(number, decimals, unit) do
    :erlang.float_to_binary(number, decimals: decimals) <> " " <> unit
  end
end
