defmodule VivaTensor do
  @moduledoc """
  Quantization for the BEAM: shrink weights 4–8×, multiply with the shrunken
  weights directly, compress whole checkpoints in supervised jobs.

      iex> weights = for i <- 1..4096, do: :math.sin(i)
      iex> t = VivaTensor.Tensor.from_list!(weights, :f32, [16, 256])
      iex> {:ok, q} = VivaTensor.quantize(t, :nf4, block_size: 64, double_quant: true)
      iex> q.format
      :nf4
      iex> {:ok, m} = VivaTensor.metrics(t, q)
      iex> m.sqnr_db > 20
      true

  Every function that can fail returns `{:ok, value}` or
  `{:error, %VivaTensor.Error{}}` and has a twin with `!` that raises.

    * `VivaTensor.Tensor`: dense tensors, read in place.
    * `VivaTensor.Quantized`: codes and scales.
    * `VivaTensor.Checkpoint`: files of tensors.
    * `VivaTensor.Job`: supervised compression of a checkpoint, or its conversion to
      another layout (`VivaTensor.Conversion`).
    * `VivaTensor.Vectors`: embedding vectors as codes, and searches in them.
    * `VivaTensor.Nx`, `VivaTensor.Axon`, `VivaTensor.Bumblebee`: tensors, models and
      checkpoints of those, where they are there.
  """

  alias VivaTensor.{Calibration, Error, Native, Options, Packed, Quantized, Tensor}

  # Methods that look at activations.
  @calibrated Calibration.methods()
  @calibrated_sparsity [:wanda, :sparsegpt]

  @doc """
  Quantizes a float tensor.

  ## Formats and their options

    * `:int8`: `block_size:` `:row` (default), `:tensor`, or an even number that
      divides the rows; `symmetric:` (`true`); `scale:` `:step` (default) or
      `:absmax`, the rule of LLM.int8(); `scale_dtype:` `:f32`, `:f16`, `:bf16`.
    * `:int6`, `:int5`, `:int4`, `:int3`, `:int2`: the same, with
      `block_size: 128` (64 for `:int2`) and `symmetric: false`;
      `zero_point:` `:integer` (default) or `:float`, as MLX stores it;
      `act_order:` (`false`) for groups in GPTQ's order.
    * `:nf4`, `:fp4`: `block_size:` a power of two (64); `double_quant:`
      (`false`). Equal to bitsandbytes byte for byte.
    * `:dynamic8`: 8-bit floats of bitsandbytes' `quantize_blockwise`, byte for
      byte; `block_size:` a power of two (256).
    * `:fp8_e4m3`, `:fp8_e5m2`: 8-bit floats; `block_size:` `:row` (default),
      `:tensor`, or a number that divides the rows; `scale_dtype:` as for `:int8`.
    * `:mxfp8`, `:mxfp8_e5m2`, `:mxfp4`: floats of the OCP's MX formats, a power of
      two for 32 of them, chosen by `scale:` `:floor` (default, the OCP's rule),
      `:bump` (compressed-tensors') or `:round` (MLX's); for `:mxfp4` also `:ggml`,
      equal to ggml byte for byte.
    * `:nvfp4`: 4-bit floats, an E4M3 scale for 16 of them and an f32 scale for the
      tensor: `scale:` `:step` (default, as compressed-tensors chooses it), `:floor`
      for a power of two, or `:ggml`, equal to ggml, which has none.
    * `:sparse24`: 2:4 sparsity, two of every four weights of a row; `values:`
      `:source` (default: floats of the tensor's dtype), `:f32`, `:f16`, `:bf16`,
      `:int8` or `:fp8_e4m3`, the last two with `block_size:` `:row` (default) or
      `:tensor` and `scale_dtype:` (`:f32`). The greatest magnitudes stay;
      `sparsify/2` chooses others.
    * `:q8_0`, `:q5_1`, `:q5_0`, `:q4_1`, `:q4_0`, `:iq4_nl` (rows of a multiple
      of 32) and `:q6_k`, `:q5_k`, `:q4_k`, `:q3_k`, `:q2_k`, `:iq4_xs` (of 256):
      no options but the method. With `:rtn` equal to ggml byte for byte.

  All take `method: :rtn` (round to nearest, the default) or `:mse` (scales
  searched for the least squared error); integers also `:hqq` (a float zero point
  found by half-quadratic splitting).

  ## Methods that look at activations

  With `activations:` a tensor `[tokens, k]` of what a weight `[n, k]` meets, or a
  `VivaTensor.Calibration` and `layer:` a name in it:

    * `method: :gptq`: column by column, each making up for the error of those before
      (Frantar et al., 2022); for integers, `:nf4`, `:fp4`, `:fp8_*`, `:mxfp*`, `:nvfp4`.
      `order: :natural` (default) or `:activation`, most active columns first;
      `damping:` (0.05).
    * `method: :awq`: columns scaled by what they meet, then blocks clipped, both by the
      error of the layer's output (Lin et al., 2023); `clip:` (`true`); `duo_scaling:`
      which scales are tried, powers of what a column meets (`false`, the default),
      those against powers of what it holds (`true`), or `:both`. The scale is
      kept and applied to the input by `matmul/3`.
    * `method: :awq_gptq`: columns scaled as AWQ scales them, by what GPTQ then costs;
      `duo_scaling:` as above.
    * `method: :smoothquant`: columns scaled by √(max|x| / max|w|), so that activations
      too fit in 8 bits (Xiao et al., 2022).
    * `method: :rotate`: a Hadamard rotation of the input, which spreads outliers
      (Ashkboos et al., 2024); with the others, `rotate: true`.

  `scales:` is then what `method:` is otherwise: `:rtn` or `:mse`, by which the scales
  of blocks are chosen; with `gptq` in the name `:mse` by default, which there looks at the
  output. With `sparsity:` `:magnitude`, `:wanda` or `:sparsegpt` those with
  `gptq` in their name give zeros to two of every four columns on the way, as
  `sparsify/2` says; `order:` is then `:natural`. `:sparse24` of `:int8` or `:fp8_e4m3`
  needs it.

      iex> w = VivaTensor.Tensor.from_list!(for(i <- 1..4096, do: :math.sin(i)), :f32, [32, 128])
      iex> x = VivaTensor.Tensor.from_list!(for(i <- 1..4096, do: :math.cos(i)), :f32, [32, 128])
      iex> {:ok, q} = VivaTensor.quantize(w, :int4, method: :gptq, activations: x)
      iex> q.format
      :int4

      iex> t = VivaTensor.Tensor.from_list!([0.5, -1.0, 0.25, 1.0], :f32, [2, 2])
      iex> VivaTensor.quantize!(t, :int8)
      #VivaTensor.Quantized<int8[2, 2] from f32, 24.000 bits per weight>

  ## Errors

  `:unknown_format`, `:invalid_option`, `:indivisible` when no block fits the
  rows, `:non_finite` when the tensor holds a NaN or infinity,
  `:unsupported_dtype` for integers, `:scale_overflow`.

      iex> t = VivaTensor.Tensor.from_list!([1.0, :nan], :f32, [2])
      iex> {:error, error} = VivaTensor.quantize(t, :int8)
      iex> error.reason
      {:non_finite, %{nan: 1, inf: 0, first: 1}}
  """
  @spec quantize(Tensor.t(), atom, keyword) :: {:ok, Quantized.t()} | {:error, Error.t()}
  def quantize(%Tensor{} = tensor, format, options \\ []) when is_atom(format) do
    cond do
      not Keyword.keyword?(options) ->
        Error.option(:quantize, "options", "expected a keyword list, got #{inspect(options)}")

      options[:method] in @calibrated ->
        with {:ok, seen, layer, options} <- seen(:quantize, options) do
          tensor.ref
          |> Native.quantize_calibrated(format, options, seen, layer)
          |> Quantized.wrap(:quantize)
        end

      true ->
        tensor.ref |> Native.quantize(format, options) |> Quantized.wrap(:quantize)
    end
  end

  @doc "Like `quantize/3`, but raises `VivaTensor.Error`."
  @spec quantize!(Tensor.t(), atom, keyword) :: Quantized.t()
  def quantize!(tensor, format, options \\ []), do: Error.bang!(quantize(tensor, format, options))

  @doc """
  A float tensor with zeros for two of every four weights of its rows: 2:4
  sparsity, which `quantize(t, :sparse24)` then stores whole, and integers with an
  integer zero point keep.

  Options:

    * `method:` by what the two that stay are chosen. `:magnitude` (default): their own.
      The others look at what the weight meets, `activations:` a tensor `[tokens, k]`,
      or a `VivaTensor.Calibration` and `layer:` a name in it. `:wanda`: magnitude times
      the norm of the column's activations (Sun et al., 2023). `:sparsegpt`: what the
      layer's output loses; those that stay make up for those that go (Frantar and
      Alistarh, 2023), with `damping:` (0.01) as for `:gptq`.
    * `scores:` with `:magnitude`, a float tensor of the same shape whose magnitudes
      count instead of the weights' own.

      iex> t = VivaTensor.Tensor.from_list!([0.5, -1.0, 0.25, 0.75], :f32, [1, 4])
      iex> t |> VivaTensor.sparsify!() |> VivaTensor.Tensor.to_list!()
      [0.0, -1.0, 0.0, 0.75]
      iex> x = VivaTensor.Tensor.from_list!([6, 1, 8, 1, -4, 1, 8, 1], :f32, [2, 4])
      iex> t |> VivaTensor.sparsify!(method: :wanda, activations: x) |> VivaTensor.Tensor.to_list!()
      [0.5, 0.0, 0.25, 0.0]

      iex> t = VivaTensor.Tensor.from_list!([0.5, -1.0, 0.25, 0.75], :f32, [1, 4])
      iex> scores = VivaTensor.Tensor.from_list!([2, 0, 1, 0], :f32, [1, 4])
      iex> sparse = VivaTensor.sparsify!(t, scores: scores)
      iex> sparse |> VivaTensor.quantize!(:sparse24) |> VivaTensor.dequantize!() |> VivaTensor.Tensor.to_list!()
      [0.5, 0.0, 0.25, 0.0]

  To round what stays in the same pass, so that later columns make up for both, give
  `sparsity:` to `quantize/3`.

  ## Errors

  `:invalid_option`, `:indivisible` where four do not divide the rows,
  `:shape_mismatch`, `:non_finite`, `:unsupported_dtype`.
  """
  @spec sparsify(Tensor.t(), keyword) :: {:ok, Tensor.t()} | {:error, Error.t()}
  def sparsify(%Tensor{ref: ref} = tensor, options \\ []) do
    if Keyword.keyword?(options) and options[:method] in @calibrated_sparsity do
      with {:ok, seen, layer, options} <- seen(:sparsify, options) do
        ref |> Native.sparsify_calibrated(options, seen, layer) |> Tensor.wrap(:sparsify)
      end
    else
      defaults = [method: :magnitude, scores: tensor]

      case Options.take(:sparsify, options, defaults) do
        {:ok, [:magnitude, %Tensor{ref: scores}]} ->
          ref |> Native.tensor_sparsify(scores) |> Tensor.wrap(:sparsify)

        {:ok, [:magnitude, other]} ->
          Error.option(:sparsify, "scores", "expected a tensor, got #{inspect(other)}")

        {:ok, [other, _]} ->
          message = "expected :magnitude, :wanda or :sparsegpt, got #{inspect(other)}"
          Error.option(:sparsify, "method", message)

        error ->
          error
      end
    end
  end

  @doc "Like `sparsify/2`, but raises `VivaTensor.Error`."
  @spec sparsify!(Tensor.t(), keyword) :: Tensor.t()
  def sparsify!(tensor, options \\ []), do: Error.bang!(sparsify(tensor, options))

  @doc """
  The values of a quantized tensor, each computed in f32 and rounded once.

  Options: `dtype:` any float dtype, such as `:f32` or `:bf16`; by default the dtype that
  it was quantized from.

      iex> t = VivaTensor.Tensor.from_list!([0.5, -1.0, 0.25, 1.0], :f32, [2, 2])
      iex> q = VivaTensor.quantize!(t, :int8)
      iex> {:ok, back} = VivaTensor.dequantize(q)
      iex> [_, -1.0, _, 1.0] = VivaTensor.Tensor.to_list!(back)
  """
  @spec dequantize(Quantized.t(), dtype: Tensor.dtype()) ::
          {:ok, Tensor.t()} | {:error, Error.t()}
  def dequantize(%Quantized{ref: ref, dtype: dtype}, options \\ []) do
    with {:ok, [dtype]} <- Options.take(:dequantize, options, dtype: dtype) do
      ref |> Native.dequantize(dtype) |> Tensor.wrap(:dequantize)
    end
  end

  @doc "Like `dequantize/2`, but raises `VivaTensor.Error`."
  @spec dequantize!(Quantized.t(), dtype: Tensor.dtype()) :: Tensor.t()
  def dequantize!(quantized, options \\ []), do: Error.bang!(dequantize(quantized, options))

  @type matmul_options :: [
          dtype: Tensor.dtype(),
          compute: :f32 | :bf16 | :int8 | :llm_int8 | :auto,
          bias: Tensor.t() | nil,
          residual: Tensor.t() | nil
        ]

  @doc """
  x · wᵀ for x `[…, k]` and a quantized w `[n, k]`, straight from the codes; the
  result is `[…, n]`.

  Options:

    * `dtype:` of the result, by default that of `x`.
    * `compute:` the arithmetic.
      * `:f32` - the default for a `VivaTensor.Quantized`: the weights are those that
        `dequantize/2` gives, products and sums are f32.
      * `:bf16` - x and weights rounded to bf16, products and sums f32: off by at most
        2⁻⁷ of the sum of the products' magnitudes, about 0.2 % of the result's norm.
        Fewer than eight rows of x are not rounded, as that would save nothing.
      * `:int8` - the default for a `VivaTensor.Packed`, and the only one (`:auto` means
        it too): each row of x is rounded to 8 bits in groups as long as the weights'
        blocks, by the group's largest magnitude; products with the codes and their sums
        are exact.
        For formats of integers and of tables: `:int8` … `:int2`, `:nf4`, `:fp4`,
        `:mxfp4`, `:nvfp4`, ggml's. The result differs from that of `:f32` by about
        1 % of its norm, for normal numbers. Of a row that holds a NaN or an infinity
        all results are NaN.
      * `:llm_int8` - for symmetric `:int8` with one scale a row: rows of x in 8 bits
        too, except for the columns in which any element reaches 6, and integer sums;
        the arithmetic of LLM.int8() in bitsandbytes.
      * `:auto` - for eight rows of x or more `:int8` where the format is one for it
        and its blocks do not cross rows, else `:bf16` where the machine has
        instructions for it (`VivaTensor.cpu/0` says `:avx512_bf16` or
        `:avx512_amx`); else `:f32`. Its contract is the loosest of the three.
    * `bias:` a tensor `[n]` that is added to every row of the result.
    * `residual:` a tensor of the result's shape that is added to it.

  Bias and residual are added in f32, the bias first, before the result is rounded to
  its dtype; they may be of any float dtype.

      iex> x = VivaTensor.Tensor.from_list!([1, 0, 0, 2], :f32, [2, 2])
      iex> w = VivaTensor.Tensor.from_list!([1, -1, 0, 1, 1, 1], :f32, [3, 2])
      iex> q = VivaTensor.quantize!(w, :int8)
      iex> {:ok, y} = VivaTensor.matmul(x, q)
      iex> y.shape
      [2, 3]
      iex> y |> VivaTensor.Tensor.to_list!() |> Enum.map(&Float.round(&1, 5))
      [1.0, 0.0, 1.0, -2.0, 2.0, 2.0]
      iex> bias = VivaTensor.Tensor.from_list!([10, 20, 30], :f32, [3])
      iex> y = VivaTensor.matmul!(x, q, bias: bias, residual: y)
      iex> y |> VivaTensor.Tensor.to_list!() |> Enum.map(&Float.round(&1, 5))
      [12.0, 20.0, 32.0, 6.0, 24.0, 34.0]

  ## Errors

  `:shape_mismatch`, `:unsupported_dtype`, also of bias and residual;
  `:invalid_option` for an arithmetic that the format has not.
  """
  @spec matmul(Tensor.t(), Quantized.t() | Packed.t(), matmul_options) ::
          {:ok, Tensor.t()} | {:error, Error.t()}
  def matmul(x, weights, options \\ [])

  def matmul(%Tensor{ref: x} = tensor, %Quantized{ref: q}, options) do
    with {:ok, compute, epilogue} <- matmul_options(tensor, options, :f32) do
      with {:ok, nil} <- Native.matmul_small(x, q, epilogue, compute) do
        Native.matmul(x, q, epilogue, compute)
      end
      |> Tensor.wrap(:matmul)
    end
  end

  def matmul(%Tensor{ref: x} = tensor, %Packed{ref: packed}, options) do
    with {:ok, compute, epilogue} <- matmul_options(tensor, options, :int8),
         :ok <- only_int8(:matmul, compute) do
      with {:ok, nil} <- Native.matmul_packed_small(x, packed, epilogue) do
        Native.matmul_packed(x, packed, epilogue)
      end
      |> Tensor.wrap(:matmul)
    end
  end

  # The arithmetic, and what becomes of the sums, as native code takes it.
  defp matmul_options(x, options, compute) do
    defaults = [dtype: x.dtype, compute: compute, bias: nil, residual: nil]

    with {:ok, [dtype, compute, bias, residual]} <- Options.take(:matmul, options, defaults),
         {:ok, bias} <- added("bias", bias),
         {:ok, residual} <- added("residual", residual) do
      {:ok, compute, {dtype, bias, residual}}
    end
  end

  defp added(_option, nil), do: {:ok, nil}
  defp added(_option, %Tensor{ref: ref}), do: {:ok, ref}

  defp added(option, other) do
    Error.option(:matmul, option, "expected a VivaTensor.Tensor, got #{inspect(other)}")
  end

  @doc "Like `matmul/3`, but raises `VivaTensor.Error`."
  @spec matmul!(Tensor.t(), Quantized.t() | Packed.t(), matmul_options) :: Tensor.t()
  def matmul!(x, weights, options \\ []), do: Error.bang!(matmul(x, weights, options))

  @doc """
  Rearranges a quantized matrix for this machine's kernels, once for all products
  with it: `matmul/3` of the result reads memory in one stream.

  The result holds nothing of `quantized`, which can be released
  (`VivaTensor.Quantized.release/1`), and takes about as many bytes.

  Options:

    * `compute:` the arithmetic to pack for: `:int8`, the only one, or `:auto`.

      iex> w = VivaTensor.Tensor.from_list!(List.duplicate(0.5, 64), :f32, [2, 32])
      iex> {:ok, packed} = w |> VivaTensor.quantize!(:q4_0) |> VivaTensor.prepack()
      iex> packed.shape
      [2, 32]
      iex> x = VivaTensor.Tensor.from_list!(List.duplicate(1.0, 32), :f32, [32])
      iex> VivaTensor.matmul!(x, packed) |> VivaTensor.Tensor.to_list!()
      [16.0, 16.0]

  ## Errors

  `:shape_mismatch` unless it is a matrix, `:invalid_option` for a format that is not
  made of integers as it lies (`:fp8_e4m3`, `:dynamic8`, `:sparse24` …).
  """
  @spec prepack(Quantized.t(), compute: :int8 | :auto) :: {:ok, Packed.t()} | {:error, Error.t()}
  def prepack(%Quantized{ref: ref}, options \\ []) do
    with {:ok, [compute]} <- Options.take(:prepack, options, compute: :int8),
         :ok <- only_int8(:prepack, compute) do
      ref |> Native.prepack() |> Packed.wrap(:prepack)
    end
  end

  @doc "Like `prepack/2`, but raises `VivaTensor.Error`."
  @spec prepack!(Quantized.t(), compute: :int8 | :auto) :: Packed.t()
  def prepack!(quantized, options \\ []), do: Error.bang!(prepack(quantized, options))

  defp only_int8(_op, compute) when compute in [:int8, :auto], do: :ok

  defp only_int8(op, other) do
    Error.option(op, "compute", "packed weights are for int8, got #{inspect(other)}")
  end

  @typedoc """
  Error of an approximation. Ratios are in decibels; a float that would be
  infinite or undefined is the atom `:infinity`, `:neg_infinity` or `:nan`.
  `mean_error` is the mean of the absolute errors, `max_error` the largest.
  `bits_per_weight` counts codes, scales and zero points;
  `bound_distance_db` is how far the SQNR stays below the rate–distortion bound
  of a Gaussian, 6.02 dB a bit. Those two only for a quantized tensor;
  `output_error` only with activations.
  """
  @type metrics :: %{
          required(:mse) => float | atom,
          required(:sqnr_db) => float | atom,
          required(:psnr_db) => float | atom,
          required(:cosine) => float | atom,
          required(:mean_error) => float | atom,
          required(:max_error) => float | atom,
          optional(:bits_per_weight) => float,
          optional(:bound_distance_db) => float | atom,
          optional(:output_error) => float | atom
        }

  @doc """
  How close a quantized (or another dense) tensor is to the original.

  With `activations:` a tensor `[…, k]` of what the weight `[n, k]` meets, or a
  `VivaTensor.Calibration` and `layer:` a name in it, whose kept rows count:
  `output_error`, ‖X·Wᵀ − X·Ŵᵀ‖ / ‖X·Wᵀ‖. Activations that a method did not see tell
  more than those that it did.

      iex> t = VivaTensor.Tensor.from_list!([0.5, -1.0, 0.25, 1.0], :f32, [4])
      iex> VivaTensor.metrics!(t, t).sqnr_db
      :infinity
      iex> VivaTensor.metrics!(t, VivaTensor.quantize!(t, :nf4)).bits_per_weight
      12.0

      iex> w = VivaTensor.Tensor.from_list!([0.5, -1.0, 0.25, 1.0], :f32, [2, 2])
      iex> near = VivaTensor.Tensor.from_list!([0.5, -1.0, 0.25, 0.0], :f32, [2, 2])
      iex> x = VivaTensor.Tensor.from_list!([0.0, 1.0], :f32, [1, 2])
      iex> Float.round(VivaTensor.metrics!(w, near, activations: x).output_error, 4)
      0.7071

  ## Errors

  `:shape_mismatch`, `:unsupported_dtype`; for activations also `:non_finite` and
  `:unknown_tensor`.
  """
  @spec metrics(Tensor.t(), Quantized.t() | Tensor.t(), keyword) ::
          {:ok, metrics} | {:error, Error.t()}
  def metrics(%Tensor{ref: x} = tensor, other, options \\ []) do
    with {:ok, [seen, layer]} <- Options.take(:metrics, options, activations: nil, layer: nil),
         {:ok, rows} <- rows(seen, layer),
         {:ok, metrics} <- x |> native_metrics(other) |> Error.wrap(:metrics),
         {:ok, error} <- tensor |> output_error(other, rows) |> Error.wrap(:metrics) do
      {:ok, Map.merge(metrics, error)}
    end
  end

  defp native_metrics(x, %Quantized{ref: q}), do: Native.quantized_metrics(x, q)
  defp native_metrics(x, %Tensor{ref: y}), do: Native.tensor_metrics(x, y)

  defp rows(%Calibration{} = seen, layer) when is_binary(layer),
    do: Calibration.samples(seen, layer)

  defp rows(seen, nil) when is_nil(seen) or is_struct(seen, Tensor), do: {:ok, seen}

  defp rows(_seen, _layer) do
    Error.option(
      :metrics,
      "activations",
      "expected a tensor […, k], or a VivaTensor.Calibration and layer: its name for this weight"
    )
  end

  defp output_error(_tensor, _other, nil), do: {:ok, %{}}

  defp output_error(%{ref: w}, other, %Tensor{ref: x}) do
    result =
      case other do
        %Quantized{ref: q} -> Native.quantized_output_error(w, q, x)
        %Tensor{ref: y} -> Native.tensor_output_error(w, y, x)
      end

    with {:ok, error} <- result, do: {:ok, %{output_error: error}}
  end

  @doc "Like `metrics/3`, but raises `VivaTensor.Error`."
  @spec metrics!(Tensor.t(), Quantized.t() | Tensor.t(), keyword) :: metrics
  def metrics!(tensor, other, options \\ []), do: Error.bang!(metrics(tensor, other, options))

  @doc """
  The formats, with a line about each.

      iex> formats = Enum.map(VivaTensor.formats(), & &1.name)
      iex> Enum.all?([:int8, :nf4, :fp8_e4m3, :mxfp4, :q4_k], &(&1 in formats))
      true
  """
  @spec formats() :: [%{name: atom, about: String.t()}]
  def formats, do: Native.formats()

  @doc """
  The layouts in which checkpoints are written, with a line about each.

      iex> VivaTensor.layouts() |> Enum.map(& &1.name) |> Enum.take(2)
      [:bitsandbytes, :awq]
  """
  @spec layouts() :: [%{name: atom, about: String.t()}]
  def layouts, do: Native.layouts()

  @doc """
  Native memory that is live now: `native_bytes` owned by the library,
  `mapped_bytes` of files mapped by open checkpoints. Results of `dequantize/2`
  and `matmul/3` are BEAM binaries and show in `:erlang.memory(:binary)`.

      iex> %{native_bytes: n, mapped_bytes: m} = VivaTensor.memory_info()
      iex> is_integer(n) and is_integer(m)
      true
  """
  @spec memory_info() :: %{native_bytes: non_neg_integer, mapped_bytes: non_neg_integer}
  def memory_info, do: Native.memory_info()

  @doc """
  The machine as native code sees it: architecture, instruction set in force
  and those available (`VIVA_TENSOR_ISA` forces one), threads of the pool.
  [Kernels](kernels.md#levels) lists the instruction sets.

      iex> :portable in VivaTensor.cpu().available
      true
  """
  @spec cpu() :: %{arch: String.t(), isa: atom, available: [atom], threads: pos_integer}
  def cpu do
    {:ok, cpu} = Native.cpu()
    cpu
  end

  # What a method looks at, a calibration and the name of the layer in it, and the other
  # options.
  defp seen(op, options) do
    {seen, options} = Keyword.split(options, [:activations, :layer])

    case {seen[:activations], seen[:layer]} do
      {%Tensor{} = x, nil} ->
        calibration = Calibration.new()

        with :ok <- Calibration.add(calibration, "x", x) do
          {:ok, calibration.ref, "x", options}
        end

      {%Calibration{ref: ref}, layer} when is_binary(layer) ->
        {:ok, ref, layer, options}

      _ ->
        Error.option(
          op,
          "activations",
          "method #{inspect(options[:method])} looks at them: give a tensor [tokens, k], " <>
            "or a VivaTensor.Calibration and layer: its name for this weight"
        )
    end
  end
end
