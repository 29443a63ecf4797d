//! Matrix products, plain and quantized: the one place where a weight format meets TensorRT.
use super::layers::padded;
use super::{LowerError, Lowering, data_type};
use graphs::{DType, Format, Node, Op, Weight};
use tensorrt_sys as trt;
use trt::MatrixOperation;

impl<'n> Lowering<'_, 'n, '_> {
    pub(super) fn linear(&self, node: &Node, weight: &Weight) -> Result<trt::Tensor<'n>, LowerError> {
        let (x, rank) = (self.value(node.inputs[0]), self.rank(node));
        let outputs = weight.shape().first().copied().unwrap_or(0);
        let wide = outputs > self.capabilities.float32_outputs;
        if wide && rank == 2 && weight.format().is_none() && self.network.dtype == DType::Float32 {
            return self.as_convolution(node, weight);
        }
        let (matrix, operation) = match weight.format() {
            // As in the checkpoint, [out, in].
            None => (self.weight(weight, rank)?, MatrixOperation::Transpose),
            // Stored [in, out], here already as numbers.
            Some(Format::Int8) if !self.capabilities.int8_keeps_bias && self.has_bias(node) => {
                (self.numbers(weight, rank)?, MatrixOperation::None)
            }
            // Stored [in, out]; the builder fuses the dequantization into the product.
            Some(format) => (self.dequantized(node, weight, format, rank)?, MatrixOperation::None),
        };
        let product = self
            .target
            .matrix_multiply(&node.path, (x, MatrixOperation::None), (matrix, operation))
            .map_err(Self::refused(node))?;
        self.of_tokens(node, product)
    }

    /// A product `[rows, in]` by `[out, in]` as a convolution of pictures of one pixel.
    fn as_convolution(&self, node: &Node, weight: &Weight) -> Result<trt::Tensor<'n>, LowerError> {
        let (refused, name) = (|| Self::refused(node), |part: &str| format!("{}/{part}", node.path));
        let constant = self.constants.get(&weight.key())?;
        let &[outputs, inputs] = &padded(constant.shape, 2)[..] else {
            return Err(LowerError::Unsupported { path: node.path.clone(), reason: "the weight is no matrix".into() });
        };
        let (x, dtype) = (self.value(node.inputs[0]), data_type(constant.dtype));
        let pixels = self.target.reshape(&name("pixels"), x, &[0, inputs, 1, 1]).map_err(refused())?;
        let kernel = [outputs, inputs, 1, 1];
        let product = self.target.convolution(&name("convolution"), pixels, dtype, kernel, constant.bytes, 1);
        self.target.reshape(&node.path, product.map_err(refused())?, &[0, outputs]).map_err(refused())
    }

    fn has_bias(&self, node: &Node) -> bool {
        let path = &node.path;
        let follows = |other: &Node| other.inputs.iter().any(|id| self.network.nodes[id.0].path == *path);
        self.network.nodes.iter().any(|other| matches!(other.op, Op::BiasAdd { .. }) && follows(other))
    }

    /// An INT8 matrix multiplied out before TensorRT sees it.
    fn numbers(&self, weight: &Weight, rank: usize) -> Result<trt::Tensor<'n>, LowerError> {
        let (key, dtype) = (weight.key(), self.network.dtype);
        let (values, scale) = (self.constants.get(&key)?, self.constants.get(&format!("{key}.scale"))?);
        let scales = quant::to_f32(scale.dtype, scale.bytes);
        let mut numbers = quant::to_f32(values.dtype, values.bytes);
        for row in numbers.chunks_exact_mut(scales.len().max(1)) {
            std::iter::zip(row, &scales).for_each(|(value, scale)| *value *= scale);
        }
        let (sizes, bytes) = (padded(values.shape, rank), self.constants.floats(dtype, &numbers));
        Ok(self.target.constant(&key, data_type(dtype), &sizes, bytes)?)
    }

    fn dequantized(
        &self,
        node: &Node,
        weight: &Weight,
        format: Format,
        rank: usize,
    ) -> Result<trt::Tensor<'n>, LowerError> {
        // TensorRT 10 dequantizes blocks of a matrix only: it gets one, and the rest of its rank afterwards.
        let blocks = matches!(format, Format::Int4 { .. });
        let inner = if blocks && !self.capabilities.blocks_of_any_rank { 2 } else { rank };
        let values = self.weight(weight, inner)?;
        let key = format!("{}.scale", weight.key());
        let scale = self.constants.get(&key)?;
        let (sizes, axis) = match format {
            // One scale per output, the last axis.
            Format::Int8 => (padded(scale.shape, 1), Some(inner - 1)),
            // Blocks along the inputs, told by the scales' shape.
            Format::Int4 { .. } => (padded(scale.shape, inner), None),
        };
        let scales = self.target.constant(&key, data_type(scale.dtype), &sizes, scale.bytes)?;
        let (name, dtype) = (format!("{}/dequantize", node.path), data_type(self.network.dtype));
        let matrix = self.target.dequantize(&name, values, scales, axis, dtype).map_err(Self::refused(node))?;
        if inner == rank {
            return Ok(matrix);
        }
        let sizes = padded(&weight.shape().into_iter().rev().collect::<Vec<_>>(), rank);
        self.target.reshape(&format!("{}/ranked", node.path), matrix, &sizes).map_err(Self::refused(node))
    }
}
