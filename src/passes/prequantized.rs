//! Layers that the checkpoint holds quantized: their weights stay what the file has, their inputs are scaled and rounded as
//! the file says, and where zero points are not in the middle the missing part of the product is added.
use super::{PassError, Passed, Plan};
use crate::checkpoint::{InputScale, QuantizedLinear};
use graphs::{BinaryKind, Dim, Format, Network, Node, NodeId, Op, Split, Type, Weight};
use quant::Method;
use std::collections::{HashMap, HashSet};

pub(super) fn prequantized(mut passed: Passed, plan: &Plan<'_>) -> Result<Passed, PassError> {
    let is_quantized = |weight: &Weight| weight.tensors().iter().any(|(name, _)| (plan.quantized)(name).is_some());
    if !passed.network.weights().any(|(_, weight)| is_quantized(weight)) {
        return Ok(passed);
    }
    let Network { name, dtype, nodes, outputs } = passed.network;
    let weights = nodes.iter().flat_map(|node| node.op.weights()).map(Weight::key).collect();
    let mut writer = Writer { nodes: Vec::new(), shared: HashMap::new(), weights };
    let mut moved: Vec<NodeId> = Vec::with_capacity(nodes.len());
    for mut node in nodes {
        node.inputs.iter_mut().for_each(|input| *input = moved[input.0]);
        let found = match &node.op {
            Op::Linear { weight: Weight::Tensor { name, .. }, .. } => (plan.quantized)(name),
            op => {
                let tensors = op.weights().into_iter().flat_map(Weight::tensors);
                let linears = tensors.filter_map(|(name, _)| Some((name, (plan.quantized)(name)?)));
                // Anything else reads the matrix in floats, which is the same unless inputs belong to it.
                let bound =
                    |(_, linear): &(&str, &QuantizedLinear)| linear.prescale || linear.inputs != InputScale::None;
                if let Some((weight, _)) = linears.into_iter().find(bound) {
                    return Err(PassError::Bound { path: node.path.clone(), weight: weight.to_owned() });
                }
                None
            }
        };
        moved.push(match found {
            Some(linear) => writer.linear(node, linear),
            None => writer.push(node),
        });
    }
    let outputs = outputs.into_iter().map(|(name, id)| (name, moved[id.0])).collect();
    passed.network = Network { name, dtype, nodes: writer.nodes, outputs };
    keep(&mut passed, plan)?;
    Ok(passed)
}

/// Lets the recipe's choices say what the checkpoint holds, where they do not contradict it.
fn keep(passed: &mut Passed, plan: &Plan<'_>) -> Result<(), PassError> {
    let held = |node: &Node| match &node.op {
        Op::Linear { weight, .. } => Some((node.path.clone(), weight.format()?)),
        _ => None,
    };
    let held: HashMap<String, Format> = passed.network.nodes.iter().filter_map(held).collect();
    for choice in &mut passed.assignments {
        let Some(&found) = held.get(&choice.path) else { continue };
        if let Some(wanted) = choice.format.filter(|wanted| *wanted != found) {
            let (recipe, path) = (plan.recipe.name.clone(), choice.path.clone());
            return Err(PassError::Contradiction { recipe, path, wanted, found });
        }
        (choice.format, choice.method) = (Some(found), Method::Nearest);
    }
    Ok(())
}

struct Writer {
    nodes: Vec<Node>,
    /// What several layers make of one input.
    shared: HashMap<(NodeId, String), NodeId>,
    /// What the model reads itself, biases among it.
    weights: HashSet<String>,
}

impl Writer {
    fn push(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        NodeId(self.nodes.len() - 1)
    }

    /// A new node of an op on `x`, of `x`'s type but for its last size.
    fn of(&mut self, path: String, op: Op, x: NodeId, last: Option<usize>) -> NodeId {
        let mut ty: Type = self.nodes[x.0].ty.clone();
        if let (Some(size), Some(place)) = (last, ty.shape.last_mut()) {
            *place = Dim::Fixed(size);
        }
        self.push(Node { path, op, inputs: vec![x], ty })
    }

    /// The same once for all layers that read `x`.
    fn shared(&mut self, key: String, path: String, op: Op, x: NodeId, last: Option<usize>) -> NodeId {
        if let Some(found) = self.shared.get(&(x, key.clone())) {
            return *found;
        }
        let made = self.of(path, op, x, last);
        self.shared.insert((x, key), made);
        made
    }

    /// A linear layer, and what belongs to it; gives the node of the result.
    fn linear(&mut self, node: Node, linear: &QuantizedLinear) -> NodeId {
        let bias = match &node.op {
            Op::Linear { weight: Weight::Tensor { name, shape }, .. } if linear.bias => {
                name.strip_suffix(".weight").map(|stem| Weight::tensor(format!("{stem}.bias"), &shape[..1]))
            }
            _ => None,
        };
        let path = node.path.clone();
        let product = self.product(node, linear);
        match bias.filter(|bias| !self.weights.contains(&bias.key())) {
            Some(weight) => self.of(format!("{path}.bias"), Op::BiasAdd { weight }, product, None),
            None => product,
        }
    }

    fn product(&mut self, node: Node, linear: &QuantizedLinear) -> NodeId {
        let Op::Linear { weight: Weight::Tensor { name, shape }, split } = &node.op else { return self.push(node) };
        let (name, path) = (name.clone(), node.path.clone());
        let [out, input] = shape[..] else { return self.push(node) };
        let stem = name.strip_suffix(".weight").unwrap_or(&name).to_owned();
        let (split, mut x) = (*split, node.inputs[0]);
        if linear.prescale {
            let weight = Weight::tensor(format!("{stem}.pre_quant_scale"), &[input]);
            x = self.of(format!("{path}/pre_quant_scale"), Op::ScaleBy { weight, divide: false }, x, None);
        }
        let plain = x;
        let rounded = format!("{path}/input");
        match &linear.inputs {
            InputScale::None => (),
            InputScale::Token => {
                x = self.shared("token".into(), rounded, Op::QuantizeInput { scale: None, wide: true }, x, None)
            }
            InputScale::Static { shape } => {
                let scale = Some(Weight::tensor(format!("{stem}.input_scale"), shape));
                x = self.of(rounded, Op::QuantizeInput { scale, wide: false }, x, None);
            }
        }
        let integers = if linear.asymmetric { format!("{name}.symmetric") } else { name.clone() };
        let scales = Weight::tensor(format!("{name}.scale"), &linear.format.scale_shape(out, input));
        let weight = Weight::Packed {
            format: linear.format,
            scales: Some(Box::new(scales)),
            of: Box::new(Weight::tensor(integers, &[out, input])),
        };
        let product = self.push(Node { op: Op::Linear { weight, split }, inputs: vec![x], ..node });
        if !linear.asymmetric {
            return product;
        }
        let groups = linear.groups;
        let matrix = |part: &str, rows, columns, split| Op::Linear {
            weight: Weight::tensor(format!("{name}.{part}"), &[rows, columns]),
            split,
        };
        let sums = matrix("group_sums", groups, input, Split::Groups);
        let sums = self.shared(format!("sums {groups}"), format!("{path}/group_sums"), sums, plain, Some(groups));
        let missing = self.of(format!("{path}/correction"), matrix("correction", out, groups, split), sums, Some(out));
        let add = Op::Binary { kind: BinaryKind::Add };
        let ty = self.nodes[product.0].ty.clone();
        self.push(Node { path: format!("{path}/corrected"), op: add, inputs: vec![product, missing], ty })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Plan, run};
    use crate::checkpoint::{InputScale, QuantizedLinear};
    use graphs::{DType, Format, Logits, Model, Network};
    use quant::Recipe;
    use serde_json::json;

    fn network() -> Network {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
            "num_attention_heads": 4, "vocab_size": 448, "max_position_embeddings": 128,
        });
        Model::from_config(&config).unwrap().networks(DType::Float16, Logits::Last).unwrap().remove(0)
    }

    /// The lines of the first layer's own mathematics after the passes, where the checkpoint has these layers quantized.
    fn lines(linear: &QuantizedLinear, parts: &[&str]) -> String {
        let quantized = |name: &str| parts.iter().any(|part| name.contains(part)).then_some(linear);
        let recipe = Recipe::preset("none").unwrap();
        let plan = Plan { quantized: &quantized, ..Plan::new(&recipe) };
        let text = graphs::print(&run(network(), &plan).unwrap().network);
        let lines =
            text.lines().filter(|line| line.contains(".mlp.") || line.contains(".q_proj") || line.contains(".k_proj"));
        lines.map(str::to_owned).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn asymmetric_groups() {
        let format = Format::Int4 { group: 32 };
        let linear = QuantizedLinear {
            format,
            asymmetric: true,
            groups: 2,
            prescale: false,
            bias: false,
            inputs: InputScale::None,
        };
        insta::assert_snapshot!(lines(&linear, &["q_proj", "k_proj"]));
    }

    #[test]
    fn scaled_and_rounded_inputs() {
        let inputs = InputScale::Static { shape: vec![] };
        let linear =
            QuantizedLinear { format: Format::Int8, asymmetric: false, groups: 1, prescale: true, bias: false, inputs };
        insta::assert_snapshot!(lines(&linear, &["q_proj", "down_proj"]));
    }

    #[test]
    fn tokens_are_rounded_once() {
        let inputs = InputScale::Token;
        let linear = QuantizedLinear {
            format: Format::Int8,
            asymmetric: false,
            groups: 1,
            prescale: false,
            bias: false,
            inputs,
        };
        insta::assert_snapshot!(lines(&linear, &["q_proj", "k_proj", "down_proj"]));
    }

    #[test]
    fn others_are_left_alone() {
        let recipe = Recipe::preset("none").unwrap();
        let plan = Plan::new(&recipe);
        assert_eq!(run(network(), &plan).unwrap().network, network());
    }
}
