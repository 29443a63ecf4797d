//! Layers of a network. Each method is named after TensorRT's `add...` and takes the layer's name first; what TensorRT
//! would take silently or crash on (axes, permutations, scales) is checked here.
use crate::abi::{Dims, Object, Permutation, Weights, call, word};
use crate::network::{Network, Tensor};
use crate::slots::{
    attention, convolution_layer, dequantize_layer, fill_layer, gather_layer, layer, network_definition,
    normalization_layer, shuffle_layer, slice_layer, soft_max_layer,
};
use crate::{
    ActivationType, AttentionNormalizationOp, CausalMaskKind, DataType, ElementWiseOperation, Error, FillOperation,
    GatherMode, KVCacheMode, MatrixOperation, ReduceOperation, Result, UnaryOperation,
};

/// Options of [`Network::attention`].
#[derive(Clone, Copy)]
pub struct AttentionOptions<'n> {
    pub causal: CausalMaskKind,
    /// Additive mask `[batch or 1, heads or 1, queries, keys]` of the query's type; not together with `causal`.
    pub mask: Option<Tensor<'n>>,
    /// Keys that count, int32 `[batch]`.
    pub key_value_lengths: Option<Tensor<'n>>,
}

impl<'w> Network<'w> {
    fn axis(&self, name: &str, x: Tensor<'_>, axis: usize) -> Result<i32> {
        let rank = self.shape(x)?.len();
        if axis < rank {
            Ok(axis as i32)
        } else {
            Err(Error::argument(name, format!("axis {axis} of a tensor of {rank} dimensions")))
        }
    }

    fn axes(&self, name: &str, x: Tensor<'_>, axes: &[usize]) -> Result<u32> {
        axes.iter().try_fold(0u32, |mask, &axis| Ok(mask | 1 << self.axis(name, x, axis)?))
    }

    pub fn elementwise(
        &self,
        name: &str,
        a: Tensor<'_>,
        b: Tensor<'_>,
        operation: ElementWiseOperation,
    ) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let operation = self.value(operation.value(family), "ElementWiseOperation")?;
        let object = call!(family, self.this(), network_definition::ADD_ELEMENT_WISE,
            (a.object => Object, b.object => Object, operation => i32) -> Object)?;
        self.finish(name, object)
    }

    pub fn unary(&self, name: &str, x: Tensor<'_>, operation: UnaryOperation) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let operation = self.value(operation.value(family), "UnaryOperation")?;
        let object = call!(family, self.this(), network_definition::ADD_UNARY,
            (x.object => Object, operation => i32) -> Object)?;
        self.finish(name, object)
    }

    pub fn activation(&self, name: &str, x: Tensor<'_>, kind: ActivationType) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let kind = self.value(kind.value(family), "ActivationType")?;
        let object = call!(family, self.this(), network_definition::ADD_ACTIVATION,
            (x.object => Object, kind => i32) -> Object)?;
        self.finish(name, object)
    }

    /// `a` times `b` over the last two dimensions; all others are equal or 1.
    pub fn matrix_multiply(
        &self,
        name: &str,
        (a, a_operation): (Tensor<'_>, MatrixOperation),
        (b, b_operation): (Tensor<'_>, MatrixOperation),
    ) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let a_operation = self.value(a_operation.value(family), "MatrixOperation")?;
        let b_operation = self.value(b_operation.value(family), "MatrixOperation")?;
        let object = call!(family, self.this(), network_definition::ADD_MATRIX_MULTIPLY,
            (a.object => Object, a_operation => i32, b.object => Object, b_operation => i32) -> Object)?;
        self.finish(name, object)
    }

    pub fn reduce(&self, name: &str, x: Tensor<'_>, operation: ReduceOperation, axes: &[usize]) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let (mask, keep) = (self.axes(name, x, axes)?, true);
        let operation = self.value(operation.value(family), "ReduceOperation")?;
        let object = call!(family, self.this(), network_definition::ADD_REDUCE,
            (x.object => Object, operation => i32, mask => u32, keep => bool) -> Object)?;
        self.finish(name, object)
    }

    pub fn concatenation(&self, name: &str, inputs: &[Tensor<'_>], axis: usize) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let first = *inputs.first().ok_or_else(|| Error::argument(name, "nothing to join"))?;
        let axis = self.axis(name, first, axis)?;
        let objects: Vec<Object> = inputs.iter().map(|input| input.object).collect();
        let object = call!(family, self.this(), network_definition::ADD_CONCATENATION,
            (objects.as_ptr() => *const Object, objects.len() as i32 => i32) -> Object)?;
        call!(family, word(object, 2), crate::slots::concatenation_layer::SET_AXIS, (axis => i32) -> ())?;
        self.finish(name, object)
    }

    fn shuffle(
        &self,
        name: &str,
        x: Tensor<'_>,
        sizes: Option<&[i64]>,
        permutation: Option<&[usize]>,
    ) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let rank = match sizes {
            Some(sizes) => sizes.len(),
            None => self.shape(x)?.len(),
        };
        let object = call!(family, self.this(), network_definition::ADD_SHUFFLE, (x.object => Object) -> Object)?;
        if let Some(sizes) = sizes {
            let dims = Self::dims(name, sizes)?;
            call!(family, word(object, 2), shuffle_layer::SET_RESHAPE_DIMENSIONS,
                (&raw const dims => *const Dims) -> ())?;
        }
        if let Some(permutation) = permutation {
            let order = order(permutation, rank)
                .ok_or_else(|| Error::argument(name, format!("{permutation:?} is no permutation of {rank} axes")))?;
            let order = Permutation { order };
            call!(family, word(object, 2), shuffle_layer::SET_SECOND_TRANSPOSE,
                (&raw const order => *const Permutation) -> ())?;
        }
        self.finish(name, object)
    }

    /// 0 takes over the size at the same place, one -1 is worked out.
    pub fn reshape(&self, name: &str, x: Tensor<'_>, sizes: &[i64]) -> Result<Tensor<'_>> {
        self.shuffle(name, x, Some(sizes), None)
    }

    pub fn transpose(&self, name: &str, x: Tensor<'_>, permutation: &[usize]) -> Result<Tensor<'_>> {
        self.shuffle(name, x, None, Some(permutation))
    }

    /// A reshape, then a transpose of its result, in one layer.
    pub fn reshape_transpose(
        &self,
        name: &str,
        x: Tensor<'_>,
        sizes: &[i64],
        permutation: &[usize],
    ) -> Result<Tensor<'_>> {
        self.shuffle(name, x, Some(sizes), Some(permutation))
    }

    /// `count` elements of one axis from `start` on.
    pub fn slice(&self, name: &str, x: Tensor<'_>, axis: usize, start: usize, count: usize) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let axis = i64::from(self.axis(name, x, axis)?);
        let dims = |size| Self::dims(name, &[size]);
        let (start, count, stride, axes) = (dims(start as i64)?, dims(count as i64)?, dims(1)?, dims(axis)?);
        let object = call!(family, self.this(), network_definition::ADD_SLICE, (x.object => Object,
            &raw const start => *const Dims, &raw const count => *const Dims, &raw const stride => *const Dims) -> Object)?;
        call!(family, word(object, 2), slice_layer::SET_AXES, (&raw const axes => *const Dims) -> ())?;
        self.finish(name, object)
    }

    /// Repeats `x`, whose sizes are 1 where `sizes` (an int64 shape tensor of the same rank) is larger.
    pub fn expand(&self, name: &str, x: Tensor<'_>, sizes: Tensor<'_>) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let shape = self.shape(x)?;
        let start = Self::dims(name, &vec![0; shape.len()])?;
        let stride: Vec<i64> = shape.iter().map(|&size| i64::from(size != 1)).collect();
        let (count, stride) = (Self::dims(name, &shape)?, Self::dims(name, &stride)?);
        let object = call!(family, self.this(), network_definition::ADD_SLICE, (x.object => Object,
            &raw const start => *const Dims, &raw const count => *const Dims, &raw const stride => *const Dims) -> Object)?;
        call!(family, word(object, 1), layer::SET_INPUT, (2 => i32, sizes.object => Object) -> ())?;
        self.finish(name, object)
    }

    /// The sizes of a tensor, int64 `[rank]`.
    pub fn shape_of(&self, name: &str, x: Tensor<'_>) -> Result<Tensor<'_>> {
        let object =
            call!(self.library().family(), self.this(), network_definition::ADD_SHAPE, (x.object => Object) -> Object)?;
        self.finish(name, object)
    }

    /// Slices of `data` along `axis`.
    pub fn gather(&self, name: &str, data: Tensor<'_>, indices: Tensor<'_>, axis: usize) -> Result<Tensor<'_>> {
        self.gather_batched(name, data, indices, axis, 0)
    }

    /// As [`Network::gather`], where the first `batched` dimensions of data and indices go together.
    pub fn gather_batched(
        &self,
        name: &str,
        data: Tensor<'_>,
        indices: Tensor<'_>,
        axis: usize,
        batched: i32,
    ) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let axis = self.axis(name, data, axis)?;
        let mode = self.value(GatherMode::Default.value(family), "GatherMode")?;
        let object = call!(family, self.this(), network_definition::ADD_GATHER_V2,
            (data.object => Object, indices.object => Object, mode => i32) -> Object)?;
        call!(family, word(object, 2), gather_layer::SET_GATHER_AXIS, (axis => i32) -> ())?;
        call!(family, word(object, 2), gather_layer::SET_NB_ELEMENT_WISE_DIMS, (batched => i32) -> ())?;
        self.finish(name, object)
    }

    /// `then` where `condition` (bool) holds, else `otherwise`; sizes are equal or 1.
    pub fn select(
        &self,
        name: &str,
        condition: Tensor<'_>,
        then: Tensor<'_>,
        otherwise: Tensor<'_>,
    ) -> Result<Tensor<'_>> {
        let object = call!(self.library().family(), self.this(), network_definition::ADD_SELECT,
            (condition.object => Object, then.object => Object, otherwise.object => Object) -> Object)?;
        self.finish(name, object)
    }

    pub fn softmax(&self, name: &str, x: Tensor<'_>, axis: usize) -> Result<Tensor<'_>> {
        let (family, mask) = (self.library().family(), self.axes(name, x, &[axis])?);
        let object = call!(family, self.this(), network_definition::ADD_SOFT_MAX, (x.object => Object) -> Object)?;
        if !object.is_null() {
            call!(family, word(object, 2), soft_max_layer::SET_AXES, (mask => u32) -> ())?;
        }
        self.finish(name, object)
    }

    pub fn cast(&self, name: &str, x: Tensor<'_>, dtype: DataType) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let dtype = self.value(dtype.value(family), "DataType")?;
        let object = call!(family, self.this(), network_definition::ADD_CAST,
            (x.object => Object, dtype => i32) -> Object)?;
        self.finish(name, object)
    }

    pub fn identity(&self, name: &str, x: Tensor<'_>) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let object = call!(family, self.this(), network_definition::ADD_IDENTITY, (x.object => Object) -> Object)?;
        self.finish(name, object)
    }

    /// 0, 1, 2 ... of int32, as many as `count` (int64 `[1]`) says.
    pub fn range(&self, name: &str, count: Tensor<'_>, start: Tensor<'_>, step: Tensor<'_>) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let operation = self.value(FillOperation::Linspace.value(family), "FillOperation")?;
        let dtype = self.value(DataType::Int32.value(family), "DataType")?;
        let dims = Self::dims(name, &[1])?;
        let object = call!(family, self.this(), network_definition::ADD_FILL_V2,
            (&raw const dims => *const Dims, operation => i32, dtype => i32) -> Object)?;
        for (place, input) in [count, start, step].into_iter().enumerate() {
            call!(family, word(object, 1), layer::SET_INPUT, (place as i32 => i32, input.object => Object) -> ())?;
        }
        call!(family, word(object, 2), fill_layer::SET_TO_TYPE, (dtype => i32) -> ())?;
        self.finish(name, object)
    }

    /// A convolution over the last two dimensions, without padding; kernel `[out, in, height, width]`.
    pub fn convolution(
        &self,
        name: &str,
        x: Tensor<'_>,
        dtype: DataType,
        kernel: [i64; 4],
        bytes: &'w [u8],
        stride: i64,
    ) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let weights = self.weights(name, dtype, &kernel, bytes)?;
        let none = Weights { dtype: weights.dtype, values: std::ptr::null(), count: 0 };
        let size = Self::dims(name, &kernel[2..])?;
        let stride = Self::dims(name, &[stride, stride])?;
        let object = call!(family, self.this(), network_definition::ADD_CONVOLUTION_ND, (x.object => Object,
            kernel[0] => i64, &raw const size => *const Dims, weights => Weights, none => Weights) -> Object)?;
        call!(family, word(object, 2), convolution_layer::SET_STRIDE_ND, (&raw const stride => *const Dims) -> ())?;
        self.finish(name, object)
    }

    /// (x - mean) / sqrt(variance + epsilon) * scale + bias over `axes`; scale and bias have x's rank and type.
    pub fn normalization(
        &self,
        name: &str,
        x: Tensor<'_>,
        scale: Tensor<'_>,
        bias: Tensor<'_>,
        axes: &[usize],
        epsilon: f32,
    ) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let mask = self.axes(name, x, axes)?;
        let method = if self.library().has(network_definition::ADD_NORMALIZATION_V2) {
            network_definition::ADD_NORMALIZATION_V2
        } else {
            network_definition::ADD_NORMALIZATION
        };
        let object = call!(family, self.this(), method,
            (x.object => Object, scale.object => Object, bias.object => Object, mask => u32) -> Object)?;
        call!(family, word(object, 2), normalization_layer::SET_EPSILON, (epsilon => f32) -> ())?;
        self.finish(name, object)
    }

    /// Values times scales: per channel of `axis` where scales are `[channels]`, else in blocks that the scales' shape
    /// tells. The scales' type is that of the result.
    pub fn dequantize(
        &self,
        name: &str,
        values: Tensor<'_>,
        scales: Tensor<'_>,
        axis: Option<usize>,
        dtype: DataType,
    ) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let (shape, scale_shape) = (self.shape(values)?, self.shape(scales)?);
        let fits = match axis {
            Some(axis) => scale_shape.len() == 1 && shape.get(axis) == scale_shape.first(),
            None => {
                // One scale for all, or one for each block.
                scale_shape.is_empty()
                    || scale_shape.len() == shape.len()
                        && std::iter::zip(&shape, &scale_shape).all(|(size, scales)| *scales > 0 && size % scales == 0)
            }
        };
        if !fits {
            let reason = format!("scales {scale_shape:?} do not fit values {shape:?} with axis {axis:?}");
            return Err(Error::argument(name, reason));
        }
        let dtype = self.value(dtype.value(family), "DataType")?;
        let object = call!(family, self.this(), network_definition::ADD_DEQUANTIZE_V2,
            (values.object => Object, scales.object => Object, dtype => i32) -> Object)?;
        if let Some(axis) = axis {
            call!(family, word(object, 2), dequantize_layer::SET_AXIS, (axis as i32 => i32) -> ())?;
        }
        self.finish(name, object)
    }

    /// x to INT8 by one scale: `scale` has one element of x's type.
    pub fn quantize(&self, name: &str, x: Tensor<'_>, scale: Tensor<'_>) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let shape = self.shape(scale)?;
        if shape.iter().any(|&size| size != 1) {
            return Err(Error::argument(name, format!("the scale is {shape:?}, wanted one number")));
        }
        let dtype = self.value(DataType::Int8.value(family), "DataType")?;
        let object = call!(family, self.this(), network_definition::ADD_QUANTIZE_V2,
            (x.object => Object, scale.object => Object, dtype => i32) -> Object)?;
        self.finish(name, object)
    }

    /// Rotates halves of each head: x `[batch, heads, tokens, dim]`, tables `[positions, dim / 2]` of x's type,
    /// `position_ids` int32 `[batch, tokens]`.
    pub fn rotary_embedding(
        &self,
        name: &str,
        x: Tensor<'_>,
        cosine: Tensor<'_>,
        sine: Tensor<'_>,
        position_ids: Tensor<'_>,
    ) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let (interleaved, all) = (false, 0);
        let object = call!(family, self.this(), network_definition::ADD_ROTARY_EMBEDDING, (x.object => Object,
            cosine.object => Object, sine.object => Object, interleaved => bool, all => i32) -> Object)?;
        call!(family, word(object, 1), layer::SET_INPUT, (3 => i32, position_ids.object => Object) -> ())?;
        self.finish(name, object)
    }

    /// Writes `update` `[batch, heads, tokens, dim]` into `cache` `[batch, heads, rows, dim]`, an input, from row
    /// `write_indices` (int32 `[batch]`) on. The result must be made an output, bound to the cache's own memory.
    pub fn kv_cache_update(
        &self,
        name: &str,
        cache: Tensor<'_>,
        update: Tensor<'_>,
        write_indices: Tensor<'_>,
    ) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let mode = self.value(KVCacheMode::Linear.value(family), "KVCacheMode")?;
        let object = call!(family, self.this(), network_definition::ADD_KV_CACHE_UPDATE, (cache.object => Object,
            update.object => Object, write_indices.object => Object, mode => i32) -> Object)?;
        self.finish(name, object)
    }

    /// softmax(query key^T + mask) value; query `[batch, heads, queries, dim]`, key and value
    /// `[batch, kv_heads, keys, dim]`. TensorRT applies no scale.
    pub fn attention(
        &self,
        name: &str,
        query: Tensor<'_>,
        key: Tensor<'_>,
        value: Tensor<'_>,
        options: AttentionOptions<'_>,
    ) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let operation = self.value(AttentionNormalizationOp::Softmax.value(family), "AttentionNormalizationOp")?;
        let causal = self.value(options.causal.value(family), "CausalMaskKind")?;
        let object = call!(family, self.this(), network_definition::ADD_ATTENTION_V2, (query.object => Object,
            key.object => Object, value.object => Object, operation => i32, causal => i32) -> Object)?;
        if object.is_null() {
            return Err(self.library().refused());
        }
        let (this, text) = (word(object, 1), Self::text(name)?);
        let mut accepted =
            call!(family, this, attention::SET_NAME, (text.as_ptr() => *const std::ffi::c_char) -> bool)?;
        // Where no fused kernel fits (float32, odd head sizes), TensorRT may take it apart.
        accepted &= call!(family, this, attention::SET_DECOMPOSABLE, (true => bool) -> bool)?;
        if let Some(mask) = options.mask {
            accepted &= call!(family, this, attention::SET_MASK, (mask.object => Object) -> bool)?;
        }
        if let Some(lengths) = options.key_value_lengths {
            accepted &= call!(family, this, attention::SET_KEY_VALUE_LENGTHS, (lengths.object => Object) -> bool)?;
        }
        if !accepted {
            return Err(self.library().refused());
        }
        let output = call!(family, this, attention::GET_OUTPUT, (0 => i32) -> Object)?;
        self.checked(name, output)
    }
}

/// The permutation as TensorRT takes it; it segfaults on an index outside the rank.
fn order(permutation: &[usize], rank: usize) -> Option<[i32; 8]> {
    let mut order = [0; 8];
    let mut seen = [false; 8];
    if permutation.len() != rank {
        return None;
    }
    for (place, &axis) in permutation.iter().enumerate() {
        let seen = seen.get_mut(axis).filter(|seen| axis < rank && !**seen)?;
        *seen = true;
        *order.get_mut(place)? = axis as i32;
    }
    Some(order)
}

#[cfg(test)]
mod tests {
    use super::order;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn only_permutations_pass(axes in proptest::collection::vec(0usize..10, 0..10), rank in 0usize..10) {
            let mut sorted = axes.clone();
            sorted.sort_unstable();
            let wanted = rank <= 8 && sorted == (0..rank).collect::<Vec<_>>();
            prop_assert_eq!(order(&axes, rank).is_some(), wanted);
        }
    }
}
