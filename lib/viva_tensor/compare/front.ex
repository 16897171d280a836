defmodule VivaTensor.Compare.Front do
  @moduledoc false
  # The picture of a comparison: bits per weight, and the error of the output or else the
  # SQNR of the weights, with a line along the rows that nothing beats.

  alias VivaTensor.Plot

  @doc """
  The plot of rows, in SVG. `measured_on` says whose activations the output error is of:
  `"held_out"`, `"calibration"`, or `nil` where there are none.
  """
  @spec svg([map], String.t() | nil, String.t() | nil) :: iodata
  def svg(rows, measured_on, title) do
    figure = if measured_on, do: :output_error, else: :sqnr_db

    points =
      for row <- rows, y = row[figure] do
        %{
          x: row.bits_per_weight,
          y: y,
          label: "#{row.format} #{row.method}",
          series: to_string(row.method),
          front: row.front
        }
      end

    Plot.scatter(points,
      title: title,
      x: "bits per weight",
      y: axis(measured_on),
      log: measured_on != nil,
      front: "Pareto front: no other has fewer bits and less error"
    )
  end

  @doc "What the vertical axis is."
  @spec axis(String.t() | nil) :: String.t()
  def axis(nil), do: "SQNR of the weights, dB"
  def axis("held_out"), do: "relative error of the output, on unseen activations"
  def axis("calibration"), do: "relative error of the output, on the calibration itself"
end
