defmodule VivaTensor.Job.FileError do
  @moduledoc false
  # Results of `File` in the one shape that errors have, as the native side gives
  # them for files of its own.

  alias VivaTensor.Error

  @doc """
  Names the path in an error; anything else stays as it is.

      iex> {:error, error} = VivaTensor.Job.FileError.wrap({:error, :enoent}, :output, "a/b")
      iex> error.reason
      {:io, %{path: "a/b", code: "enoent", message: "no such file or directory"}}
  """
  @spec wrap(:ok | {:ok, term} | {:error, File.posix()}, atom, Path.t()) ::
          :ok | {:ok, term} | {:error, Error.t()}
  def wrap({:error, code}, op, path) do
    message = code |> :file.format_error() |> List.to_string()
    details = %{path: path, code: to_string(code), message: message}
    {:error, Error.new(op, {:io, details}, "#{path}: #{message}")}
  end

  def wrap(result, _op, _path), do: result
end
