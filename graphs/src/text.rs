//! Networks as text, one line per node: what snapshots hold, what the reference target runs, and back again.
use crate::{Axis, DType, Dim, GraphError, Network, Node, NodeId, Op, Type};
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// `%3 model.norm = norm(%2) {"kind":"rms",...} : float16[batch,tokens,64]`, between a header and the outputs.
pub fn print(network: &Network) -> String {
    let mut text = format!("network {} {}\n", network.name, network.dtype);
    for (position, node) in network.nodes.iter().enumerate() {
        let _ = writeln!(text, "{}", print_node(position, node));
    }
    for (name, id) in &network.outputs {
        let _ = writeln!(text, "output {name} = %{}", id.0);
    }
    text
}

fn print_node(position: usize, node: &Node) -> String {
    let inputs: Vec<String> = node.inputs.iter().map(|id| format!("%{}", id.0)).collect();
    let attributes = match attributes(&node.op) {
        Some(attributes) => format!(" {attributes}"),
        None => String::new(),
    };
    format!("%{position} {} = {}({}){attributes} : {}", node.path, node.op.name(), inputs.join(", "), node.ty)
}

/// Serde writes an op as `{"name":{attributes}}`, or as `"name"` where it has none.
fn attributes(op: &Op) -> Option<String> {
    let text = serde_json::to_string(op).ok()?;
    let rest = text.strip_prefix("{\"")?.strip_prefix(op.name())?.strip_prefix("\":")?;
    rest.strip_suffix('}').map(str::to_string)
}

/// Reads what [`print`] wrote.
///
/// # Errors
/// [`GraphError::Text`] with the line.
pub fn parse(text: &str) -> Result<Network, GraphError> {
    let mut network = Network { name: String::new(), dtype: DType::Float32, nodes: Vec::new(), outputs: Vec::new() };
    for (number, line) in text.lines().enumerate() {
        parse_line(&mut network, number, line)
            .ok_or_else(|| GraphError::Text { line: number + 1, reason: format!("cannot read `{line}`") })?;
    }
    Ok(network)
}

fn parse_line(network: &mut Network, number: usize, line: &str) -> Option<()> {
    if number == 0 {
        let (name, dtype) = line.strip_prefix("network ")?.split_once(' ')?;
        network.name = name.into();
        network.dtype = DType::parse(dtype)?;
    } else if let Some(output) = line.strip_prefix("output ") {
        let (name, id) = output.split_once(" = ")?;
        network.outputs.push((name.into(), parse_id(id)?));
    } else {
        let (head, rest) = line.split_once(" = ")?;
        let (id, path) = head.split_once(' ')?;
        (parse_id(id)?.0 == network.nodes.len()).then_some(())?;
        let (name, rest) = rest.split_once('(')?;
        let (inputs, rest) = rest.split_once(')')?;
        let (attributes, ty) = rest.rsplit_once(" : ")?;
        let inputs = inputs.split(", ").filter(|id| !id.is_empty()).map(parse_id).collect::<Option<Vec<_>>>()?;
        let op = parse_op(name, attributes.trim())?;
        network.nodes.push(Node { path: path.into(), op, inputs, ty: parse_type(ty)? });
    }
    Some(())
}

fn parse_op(name: &str, attributes: &str) -> Option<Op> {
    let value = if attributes.is_empty() {
        json!(name)
    } else {
        Value::Object(Map::from_iter([(name.to_string(), serde_json::from_str(attributes).ok()?)]))
    };
    serde_json::from_value(value).ok()
}

fn parse_id(text: &str) -> Option<NodeId> {
    text.strip_prefix('%')?.parse().ok().map(NodeId)
}

fn parse_type(text: &str) -> Option<Type> {
    let (dtype, shape) = text.strip_suffix(']')?.split_once('[')?;
    let dim = |text: &str| match Axis::parse(text) {
        Some(axis) => Some(Dim::Named(axis)),
        None => text.parse().ok().map(Dim::Fixed),
    };
    let shape = shape.split(',').filter(|dim| !dim.is_empty()).map(dim).collect::<Option<Vec<_>>>()?;
    Some(Type::new(DType::parse(dtype)?, shape))
}
