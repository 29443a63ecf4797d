//! Layers that TensorRT-RTX and TensorRT 10 spell alike.
use super::{LowerError, Lowering, data_type};
use graphs::{ActivationKind, DType, Node, NormKind, OwnIds, Weight};
use tensorrt_sys as trt;
use trt::{ActivationType, ElementWiseOperation, ReduceOperation, UnaryOperation};

type Value<'n> = Result<trt::Tensor<'n>, LowerError>;

impl<'n, 'w> Lowering<'_, 'n, 'w> {
    pub(super) fn refused(node: &Node) -> impl FnOnce(trt::Error) -> LowerError + use<> {
        let path = node.path.clone();
        move |source| LowerError::Layer { path, source }
    }

    /// A weight as a constant whose shape is padded on the left to `rank` dimensions.
    pub(super) fn weight(&self, weight: &Weight, rank: usize) -> Value<'n> {
        let key = weight.key();
        let constant = self.constants.get(&key)?;
        let sizes = padded(constant.shape, rank);
        Ok(self.target.constant(&key, data_type(constant.dtype), &sizes, constant.bytes)?)
    }

    /// One number of the network's type that fits any tensor of `rank` dimensions.
    pub(super) fn number(&self, name: &str, value: f32, dtype: DType, rank: usize) -> Value<'n> {
        let bytes = self.constants.floats(dtype, &[value]);
        Ok(self.target.constant(name, data_type(dtype), &vec![1; rank], bytes)?)
    }

    /// Whole numbers, int32.
    pub(super) fn integers(&self, name: &str, values: &[i32], sizes: &[i64]) -> Value<'n> {
        Ok(self.target.constant(name, trt::DataType::Int32, sizes, self.constants.ints(values))?)
    }

    pub(super) fn rank(&self, node: &Node) -> usize {
        self.ty(node.inputs[0]).shape.len()
    }

    pub(super) fn bias_add(&self, node: &Node, weight: &Weight) -> Value<'n> {
        let (x, bias) = (self.value(node.inputs[0]), self.weight(weight, self.rank(node))?);
        // The node of a bias has the bias's own name, which the constant has taken.
        let name = format!("{}/add", node.path);
        self.target.elementwise(&name, x, bias, ElementWiseOperation::Sum).map_err(Self::refused(node))
    }

    pub(super) fn norm(
        &self,
        node: &Node,
        kind: NormKind,
        weight: &Weight,
        bias: Option<&Weight>,
        epsilon: f32,
    ) -> Value<'n> {
        let (x, rank, path) = (self.value(node.inputs[0]), self.rank(node), node.path.as_str());
        let last = rank - 1;
        let refused = || Self::refused(node);
        match (kind, bias) {
            (NormKind::Layer, Some(bias)) => {
                let (scale, bias) = (self.weight(weight, rank)?, self.weight(bias, rank)?);
                self.target.normalization(path, x, scale, bias, &[last], epsilon).map_err(refused())
            }
            (NormKind::Layer, None) => {
                Err(LowerError::Unsupported { path: path.into(), reason: "a layer norm needs a bias".into() })
            }
            // There is no native layer; the builder fuses this into one kernel. Squares need float32's range.
            (NormKind::Rms, _) => {
                let name = |part: &str| format!("{path}/{part}");
                let wide = self.target.cast(&name("float"), x, trt::DataType::Float).map_err(refused())?;
                let product = |part, a, b| {
                    self.target.elementwise(&name(part), a, b, ElementWiseOperation::Prod).map_err(refused())
                };
                let square = product("square", wide, wide)?;
                let mean =
                    self.target.reduce(&name("mean"), square, ReduceOperation::Avg, &[last]).map_err(refused())?;
                let epsilon = self.number(&name("epsilon"), epsilon, DType::Float32, rank)?;
                let sum = self
                    .target
                    .elementwise(&name("sum"), mean, epsilon, ElementWiseOperation::Sum)
                    .map_err(refused())?;
                let root = self.target.unary(&name("root"), sum, UnaryOperation::Sqrt).map_err(refused())?;
                let inverse = self.target.unary(&name("inverse"), root, UnaryOperation::Recip).map_err(refused())?;
                let normed = product("normed", wide, inverse)?;
                // Of a stream that is wider than the network (T5) the weight is not.
                let dtype = data_type(node.ty.dtype);
                let narrow = self.target.cast(&name("narrow"), normed, dtype).map_err(refused())?;
                let mut scale = self.weight(weight, rank)?;
                if node.ty.dtype != self.network.dtype {
                    scale = self.target.cast(&name("weight"), scale, dtype).map_err(refused())?;
                }
                self.target.elementwise(path, narrow, scale, ElementWiseOperation::Prod).map_err(refused())
            }
        }
    }

    pub(super) fn activation(&self, node: &Node, kind: ActivationKind) -> Value<'n> {
        let (x, path) = (self.value(node.inputs[0]), node.path.as_str());
        let native = |kind| self.target.activation(path, x, kind).map_err(Self::refused(node));
        match kind {
            ActivationKind::Relu => native(ActivationType::Relu),
            ActivationKind::Gelu => native(ActivationType::GeluErf),
            ActivationKind::GeluTanh => native(ActivationType::GeluTanh),
            ActivationKind::Silu => self.gated(node, x),
            ActivationKind::QuickGelu => {
                let factor = self.number(&format!("{path}/factor"), 1.702, self.network.dtype, self.rank(node))?;
                let name = format!("{path}/scaled");
                let scaled = self.target.elementwise(&name, x, factor, ElementWiseOperation::Prod);
                self.gated(node, scaled.map_err(Self::refused(node))?)
            }
        }
    }

    /// x * sigmoid(gate)
    fn gated(&self, node: &Node, gate: trt::Tensor<'n>) -> Value<'n> {
        let x = self.value(node.inputs[0]);
        let name = format!("{}/sigmoid", node.path);
        let gate = self.target.activation(&name, gate, ActivationType::Sigmoid).map_err(Self::refused(node))?;
        self.target.elementwise(&node.path, x, gate, ElementWiseOperation::Prod).map_err(Self::refused(node))
    }

    pub(super) fn conv(&self, node: &Node, weight: &Weight, stride: usize) -> Value<'n> {
        let constant = self.constants.get(&weight.key())?;
        let sizes = padded(constant.shape, 4);
        let &[out, channels, height, width] = &sizes[..] else {
            return Err(LowerError::Unsupported {
                path: node.path.clone(),
                reason: "the kernel has no 4 sizes".into(),
            });
        };
        let (x, kernel, dtype) = (self.value(node.inputs[0]), [out, channels, height, width], constant.dtype);
        self.target
            .convolution(&node.path, x, data_type(dtype), kernel, constant.bytes, stride as i64)
            .map_err(Self::refused(node))
    }

    /// Ids past the table's end, which `splice` replaces, take its last row; those of other ranks zeros.
    pub(super) fn embed(&self, node: &Node, weight: &Weight, own: Option<&OwnIds>) -> Value<'n> {
        if let Some(own) = own {
            return self.embed_own(node, weight, own);
        }
        let vocab = weight.shape().first().copied().unwrap_or(1);
        let ids = self.value(node.inputs[0]);
        let last = self.integers(&format!("{}/last", node.path), &[vocab as i32 - 1], &vec![1; self.rank(node)])?;
        let name = format!("{}/clamped", node.path);
        let clamped = self.target.elementwise(&name, ids, last, ElementWiseOperation::Min);
        let clamped = clamped.map_err(Self::refused(node))?;
        let table = self.weight(weight, 2)?;
        self.target.gather(&node.path, table, clamped, 0).map_err(Self::refused(node))
    }

    /// Other ids take any row, in the place of which a zero is selected.
    fn embed_own(&self, node: &Node, weight: &Weight, own: &OwnIds) -> Value<'n> {
        let refused = || Self::refused(node);
        let name = |part: &str| format!("{}/{part}", node.path);
        let (ids, rank) = (self.value(node.inputs[0]), self.rank(node));
        let integer = |part: &str, value: i64| self.integers(&name(part), &[value as i32], &vec![1; rank]);
        let elementwise = |part: &str, a, b, kind| self.target.elementwise(&name(part), a, b, kind).map_err(refused());
        let (before, end) = (integer("before", own.first as i64 - 1)?, integer("end", own.end as i64)?);
        let not_before = elementwise("not_before", ids, before, ElementWiseOperation::Greater)?;
        let not_after = elementwise("not_after", ids, end, ElementWiseOperation::Less)?;
        let mine = elementwise("own", not_before, not_after, ElementWiseOperation::And)?;
        let row =
            elementwise("row", ids, integer("shift", own.first as i64 - own.row as i64)?, ElementWiseOperation::Sub)?;
        let row = elementwise("row_or_first", row, integer("first", own.row as i64)?, ElementWiseOperation::Max)?;
        let last = (own.row + own.end).saturating_sub(own.first + 1);
        let row = elementwise("row_or_last", row, integer("last", last as i64)?, ElementWiseOperation::Min)?;
        let rows = self.target.gather(&name("rows"), self.weight(weight, 2)?, row, 0).map_err(refused())?;
        let sizes: Vec<i64> = std::iter::repeat_n(0, rank).chain([1]).collect();
        let condition = self.target.reshape(&name("condition"), mine, &sizes).map_err(refused())?;
        let zero = self.number(&name("zero"), 0.0, node.ty.dtype, rank + 1)?;
        self.target.select(&node.path, condition, rows, zero).map_err(refused())
    }

    pub(super) fn splice(&self, node: &Node, vocab: usize) -> Value<'n> {
        let [x, ids, table] = [0, 1, 2].map(|place| self.value(node.inputs[place]));
        let refused = || Self::refused(node);
        let name = |part: &str| format!("{}/{part}", node.path);
        let last = self.integers(&name("last"), &[vocab as i32 - 1], &[1, 1])?;
        let first = self.integers(&name("first"), &[vocab as i32], &[1, 1])?;
        let zero = self.integers(&name("zero"), &[0], &[1, 1])?;
        let elementwise = |part: &str, a, b, kind| self.target.elementwise(&name(part), a, b, kind).map_err(refused());
        let is_feature = elementwise("is_feature", ids, last, ElementWiseOperation::Greater)?;
        let row = elementwise("row", ids, first, ElementWiseOperation::Sub)?;
        let row = elementwise("row_or_zero", row, zero, ElementWiseOperation::Max)?;
        let features = self.target.gather(&name("features"), table, row, 0).map_err(refused())?;
        let condition = self.target.reshape(&name("condition"), is_feature, &[0, 0, 1]).map_err(refused())?;
        self.target.select(&node.path, condition, features, x).map_err(refused())
    }

    /// Zeros joined to `x`, repeated over its other sizes, of which only the running engine knows some.
    pub(super) fn pad(&self, node: &Node, axis: usize, after: usize) -> Value<'n> {
        let refused = || Self::refused(node);
        let name = |part: &str| format!("{}/{part}", node.path);
        let (x, rank) = (self.value(node.inputs[0]), self.rank(node));
        let zero = self.number(&name("zero"), 0.0, node.ty.dtype, rank)?;
        let sizes = self.target.shape_of(&name("shape"), x).map_err(refused())?;
        let part = |part, start, count| self.target.slice(&name(part), sizes, 0, start, count).map_err(refused());
        let count = self.integers(&name("count"), &[after as i32], &[1])?;
        let mut parts = vec![self.target.cast(&name("count64"), count, trt::DataType::Int64).map_err(refused())?];
        if axis > 0 {
            parts.insert(0, part("before", 0, axis)?);
        }
        if axis + 1 < rank {
            parts.push(part("behind", axis + 1, rank - axis - 1)?);
        }
        let sizes = self.target.concatenation(&name("expanded"), &parts, 0).map_err(refused())?;
        let zeros = self.target.expand(&name("zeros"), zero, sizes).map_err(refused())?;
        self.target.concatenation(&node.path, &[x, zeros], axis).map_err(refused())
    }

    /// Two parts of `x`, the other way round.
    pub(super) fn roll(&self, node: &Node, axis: usize, by: usize) -> Value<'n> {
        let x = self.value(node.inputs[0]);
        let size = node.ty.shape.get(axis).and_then(|dim| dim.fixed()).unwrap_or(by);
        let part = |name: &str, start, count| {
            let name = format!("{}/{name}", node.path);
            self.target.slice(&name, x, axis, start, count).map_err(Self::refused(node))
        };
        let parts = [part("behind", by, size - by)?, part("before", 0, by)?];
        self.target.concatenation(&node.path, &parts, axis).map_err(Self::refused(node))
    }

    /// Repeats a weight over the batch, whose size only the running engine knows.
    pub(super) fn broadcast(&self, node: &Node, weight: &Weight) -> Value<'n> {
        let refused = || Self::refused(node);
        let name = |part: &str| format!("{}/{part}", node.path);
        let shape = weight.shape();
        let constant = self.weight(weight, 1 + shape.len())?;
        let sizes = self.target.shape_of(&name("shape"), self.value(node.inputs[0])).map_err(refused())?;
        let batch = self.target.slice(&name("batch"), sizes, 0, 0, 1).map_err(refused())?;
        let rest: Vec<i32> = shape.iter().map(|&size| size as i32).collect();
        let rest = self.integers(&name("sizes"), &rest, &[rest.len() as i64])?;
        let rest = self.target.cast(&name("sizes64"), rest, trt::DataType::Int64).map_err(refused())?;
        let sizes = self.target.concatenation(&name("expanded"), &[batch, rest], 0).map_err(refused())?;
        self.target.expand(&name("expand"), constant, sizes).map_err(refused())
    }
}

/// A shape with ones before it up to `rank` dimensions.
pub(super) fn padded(shape: &[usize], rank: usize) -> Vec<i64> {
    let ones = rank.saturating_sub(shape.len());
    std::iter::repeat_n(1, ones).chain(shape.iter().map(|&size| size as i64)).collect()
}
