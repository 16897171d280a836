defmodule VivaTensor.Compare.Histogram do
  @moduledoc false
  # How the weights of a tensor are spread, beside the values that the codes of a format
  # give them.

  alias VivaTensor.{Error, Native, Quantized, Tensor}

  @type t :: VivaTensor.Compare.histogram()

  @doc """
  The histogram of a weight and what it was quantized to; of a large one that of the
  first million elements. `nil` where codes stand for scaled, rotated or reordered
  weights.

      iex> w = VivaTensor.Tensor.from_list!([1.0, 0.1, 0.0, -1.0], :f32, [1, 4])
      iex> q = VivaTensor.quantize!(w, :nf4)
      iex> {:ok, histogram} = VivaTensor.Compare.Histogram.of(w, q)
      iex> for counts <- [histogram.weights, histogram.values] do
      ...>   for {n, bin} <- Enum.with_index(counts), n > 0, do: bin
      ...> end
      [[0, 64, 70, 128], [0, 64, 69, 128]]
  """
  @spec of(Tensor.t(), Quantized.t()) :: {:ok, t | nil} | {:error, Error.t()}
  def of(%Tensor{ref: x}, %Quantized{ref: q}),
    do: x |> Native.quantized_histogram(q) |> Error.wrap(:compare)

  @doc "That of several tensors together, if each has one."
  @spec sum([t | nil]) :: t | nil
  def sum(histograms) do
    if Enum.all?(histograms) do
      for key <- [:weights, :values], into: %{} do
        {key, histograms |> Enum.map(& &1[key]) |> Enum.zip_with(&Enum.sum/1)}
      end
    end
  end
end
