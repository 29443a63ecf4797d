//! Inputs of INT8 products: quantized and dequantized again, which the builder joins with the product into INT8 arithmetic.
use super::{LowerError, Lowering, data_type};
use graphs::{Node, NodeId, Weight};
use tensorrt_sys as trt;
use trt::{ElementWiseOperation, ReduceOperation, UnaryOperation};

/// What the largest magnitude of a token counts as at least: the smallest normal float16.
const LEAST: f32 = 1.0 / 16384.0;

/// What a step of a divided token is: tokens are divided by so much larger scales, so that sums of 127 times many weights
/// stay within float16. A power of two, which changes no rounding.
const STEP: f32 = 1.0 / 128.0;

impl<'n> Lowering<'_, 'n, '_> {
    /// One scale known beforehand, or one for each token. Those cannot be the scales of a quantize layer, which wants
    /// constants: the tokens are divided by them before, and the products multiplied by them after ([`Self::of_tokens`]).
    pub(super) fn quantize_input(
        &mut self,
        node: &Node,
        scale: Option<&Weight>,
        wide: bool,
    ) -> Result<trt::Tensor<'n>, LowerError> {
        let refused = || Self::refused(node);
        let name = |part: &str| format!("{}/{part}", node.path);
        let (x, rank, dtype) = (self.value(node.inputs[0]), self.rank(node), node.ty.dtype);
        let (x, scale) = match scale {
            Some(scale) => {
                let constant = self.constants.get(&scale.key())?;
                (x, self.target.constant(&name("scale"), data_type(constant.dtype), &[], constant.bytes)?)
            }
            None => {
                let of = node.inputs.get(1).map_or(x, |most| self.value(*most));
                let most = self.magnitudes(node, of);
                let least = self.number(&name("least"), LEAST, dtype, rank)?;
                let most = self.target.elementwise(&name("at_least"), most?, least, ElementWiseOperation::Max);
                // Divided as in the reference: the largest value of a `wide` token is half a step from both its neighbours, so
                // that the last bit of the scale decides.
                let steps = if wide { 127.5 } else { 127.0 };
                let steps = self.number(&name("steps"), steps * STEP, dtype, rank)?;
                let scales = self.target.elementwise(
                    &name("scales"),
                    most.map_err(refused())?,
                    steps,
                    ElementWiseOperation::Div,
                );
                let scales = scales.map_err(refused())?;
                self.token_scales.insert(NodeId(self.values.len()), scales);
                let divided = self.target.elementwise(&name("divided"), x, scales, ElementWiseOperation::Div);
                let step = self.constants.floats(dtype, &[STEP]);
                (divided.map_err(refused())?, self.target.constant(&name("step"), data_type(dtype), &[], step)?)
            }
        };
        let quantized = self.target.quantize(&name("quantize"), x, scale).map_err(refused())?;
        self.target.dequantize(&node.path, quantized, scale, None, data_type(dtype)).map_err(refused())
    }

    /// The largest magnitude of each token, `[..., 1]`.
    fn magnitudes(&self, node: &Node, x: trt::Tensor<'n>) -> Result<trt::Tensor<'n>, LowerError> {
        let name = |part: &str| format!("{}/{part}", node.path);
        let all = self.target.unary(&name("magnitudes"), x, UnaryOperation::Abs).map_err(Self::refused(node))?;
        let last = [self.rank(node) - 1];
        self.target.reduce(&name("most"), all, ReduceOperation::Max, &last).map_err(Self::refused(node))
    }

    /// The same at one rank's place, `[..., ranks]`.
    pub(super) fn largest(&self, node: &Node, rank: usize, ranks: usize) -> Result<trt::Tensor<'n>, LowerError> {
        let most = self.magnitudes(node, self.value(node.inputs[0]))?;
        let places: Vec<f32> = (0..ranks).map(|place| if place == rank { 1.0 } else { 0.0 }).collect();
        let mut sizes = vec![1; self.rank(node)];
        if let Some(last) = sizes.last_mut() {
            *last = ranks as i64;
        }
        let (name, dtype) = (format!("{}/place", node.path), node.ty.dtype);
        let place = self.target.constant(&name, data_type(dtype), &sizes, self.constants.floats(dtype, &places))?;
        self.target.elementwise(&node.path, most, place, ElementWiseOperation::Prod).map_err(Self::refused(node))
    }

    /// Products of tokens that were divided by scales of their own, multiplied by them again.
    pub(super) fn of_tokens(&self, node: &Node, product: trt::Tensor<'n>) -> Result<trt::Tensor<'n>, LowerError> {
        let Some(&scales) = node.inputs.first().and_then(|input| self.token_scales.get(input)) else {
            return Ok(product);
        };
        let name = format!("{}/of_tokens", node.path);
        self.target.elementwise(&name, product, scales, ElementWiseOperation::Prod).map_err(Self::refused(node))
    }
}
