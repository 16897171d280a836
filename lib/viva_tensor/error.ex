defmodule VivaTensor.Error do
  @moduledoc """
  Why an operation failed.

  Every fallible function returns `{:error, %VivaTensor.Error{}}`; its bang twin
  raises the same struct. `reason` is `{kind, details}`, to match on; the
  message tells a person what to change.

      iex> {:error, error} = VivaTensor.Tensor.from_binary(<<0, 0>>, :f32, [1])
      iex> error.op
      :from_binary
      iex> error.reason
      {:size_mismatch, %{what: "bytes of a f32 tensor of shape [1]", expected: 4, actual: 2}}
      iex> Exception.message(error)
      "from_binary: bytes of a f32 tensor of shape [1]: expected 4, got 2"

  ## Kinds

  | kind | details |
  |---|---|
  | `:unknown_format`, `:unknown_layout`, `:unknown_dtype`, `:unknown_recipe` | `name`, `known` |
  | `:invalid_option` | `option`, `message` |
  | `:shape_mismatch`, `:size_mismatch` | `what`, `expected`, `actual` |
  | `:shape_overflow` | `shape` |
  | `:unsupported_dtype` | `op`, `dtype` |
  | `:indivisible` | `row`, `block` |
  | `:non_finite` | `nan`, `inf`, `first`: counts, and the first one's index; `vector` where it is in one |
  | `:scale_overflow` | `scale`, `dtype` |
  | `:singular_hessian` | `damping` |
  | `:released` | |
  | `:layout_mismatch` | `layout`, `format`, `message` |
  | `:invalid_file` | `path`, `message` |
  | `:invalid_dump` | `message` |
  | `:unknown_tensor` | `name`, `hint` |
  | `:io` | `path`, `code` (`"enospc"`, `"eacces"`, `"enoent"`, `"ebusy"` …), `message` |
  | `:cancelled` | |
  | `:missing_statistics` | `layers` |
  | `:already_quantized` | `quant_method` |
  | `:invalid_vector` | `vector`, `message` |
  | `:no_vectors` | |
  | `:changed` | `changes`: each with `what` and `how` |
  | `:unfinished`, `:nothing_to_resume` | `path` |
  | `:worker_crashed` | `work`, `attempts`, `reason` |
  | `:timeout` | `milliseconds` |
  | `:no_job` | `reason` |
  | `:another_node` | `how` |
  | `:no_queue` | |
  | `:missing_library` | `library` |
  """

  @type t :: %__MODULE__{op: atom, reason: {atom, map}, message: String.t()}

  defexception [:op, :reason, :message]

  @impl true
  def message(%__MODULE__{op: op, message: message}), do: "#{op}: #{message}"

  @doc false
  # An error of `op`, with a reason and a message for people.
  @spec new(atom, {atom, map}, String.t()) :: t
  def new(op, {kind, details} = reason, message) when is_atom(kind) and is_map(details) do
    %__MODULE__{op: op, reason: reason, message: message}
  end

  @doc false
  # What a NIF returns, with the name of the operation that called it.
  @spec wrap({:ok, value} | {:error, {atom, map, String.t()}}, atom) ::
          {:ok, value} | {:error, t}
        when value: term
  def wrap({:ok, value}, _op), do: {:ok, value}

  def wrap({:error, {kind, details, message}}, op) do
    {:error, new(op, {kind, details}, message)}
  end

  @doc false
  @spec option(atom, String.t(), String.t()) :: {:error, t}
  def option(op, option, message) do
    reason = {:invalid_option, %{option: option, message: message}}
    {:error, new(op, reason, "option #{option}: #{message}")}
  end

  @doc false
  # The bang twin of a result.
  @spec bang!({:ok, value} | {:error, t}) :: value when value: term
  def bang!({:ok, value}), do: value
  def bang!({:error, error}), do: raise(error)
end
