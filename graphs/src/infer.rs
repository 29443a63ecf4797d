//! The type of a node from its op and its inputs' types; what the DSL and the verifier both ask.
use crate::{Attention, DType, Dim, Mask, Op, OwnIds, Type, Weight};

/// A reason why an op does not fit its inputs, without the node's path (the caller knows it).
pub(crate) type Misfit = String;

/// The result type of `op`, or what does not fit. `declared` is the node's own type, which only inputs need.
pub fn infer(op: &Op, inputs: &[&Type], declared: Option<&Type>, compute: DType) -> Result<Type, String> {
    check_count(op, inputs.len())?;
    let first = || inputs.first().copied().ok_or_else(|| "has no input".to_string());
    match op {
        Op::Input => declared.cloned().ok_or_else(|| "an input needs a type".into()),
        Op::Linear { weight, .. } => {
            let x = first()?;
            let (out, width) = matrix(weight)?;
            let last = last_fixed(x)?;
            if last != width {
                return Err(format!("weight `{}` is [{out},{width}] but the input is {x}", weight.key()));
            }
            let mut shape = x.shape.clone();
            shape.pop();
            shape.push(out.into());
            Ok(Type::new(x.dtype, shape))
        }
        Op::BiasAdd { weight } => ends_with(first()?, weight).map(|()| inputs[0].clone()),
        Op::Norm { weight, bias, .. } => {
            for weight in std::iter::once(weight).chain(bias) {
                let x = first()?;
                let shape = weight.shape();
                if shape != [last_fixed(x)?] {
                    return Err(format!("weight `{}` is {shape:?} but the input is {x}", weight.key()));
                }
            }
            Ok(inputs[0].clone())
        }
        Op::Activation { .. } | Op::Scale { .. } | Op::AllReduce { .. } => first().cloned(),
        Op::ScaleBy { weight, .. } => {
            let (x, shape) = (first()?, weight.shape());
            match shape == [last_fixed(x)?] {
                true => Ok(x.clone()),
                false => Err(format!("weight `{}` is {shape:?} but the input is {x}", weight.key())),
            }
        }
        Op::QuantizeInput { scale, .. } => match scale.as_ref().filter(|scale| scale.count() != 1) {
            None => match (inputs.get(1), scale) {
                (Some(most), _) if most.shape.len() != first()?.shape.len() => {
                    Err(format!("the largest magnitudes are {most} but the input is {}", first()?))
                }
                (Some(_), Some(_)) => Err("it has a scale and looks for others".into()),
                _ => first().cloned(),
            },
            Some(scale) => Err(format!("scale `{}` is {:?}, wanted one number", scale.key(), scale.shape())),
        },
        Op::Largest { rank, ranks } => {
            let mut ty = first()?.clone();
            match ty.shape.last_mut() {
                Some(last) if rank < ranks => *last = (*ranks).into(),
                _ => return Err(format!("there is no place {rank} of {ranks} in {ty}")),
            }
            Ok(ty)
        }
        Op::Binary { .. } => {
            let x = first()?;
            if inputs[1] != x {
                return Err(format!("the operands differ: {x} and {}", inputs[1]));
            }
            Ok(x.clone())
        }
        Op::Attention(attention) => infer_attention(attention, inputs),
        Op::Conv { weight, stride } => infer_conv(weight, *stride, first()?),
        Op::Embed { weight, own, .. } => {
            let ids = first()?;
            let (rows, hidden) = matrix(weight)?;
            if let Some(OwnIds { first, end, row }) = own
                && (end < first || end - first > rows || *row > rows - (end - first))
            {
                return Err(format!("the ids {first}..{end} are not in the {rows} rows from {row} on"));
            }
            let mut shape = ids.shape.clone();
            shape.push(hidden.into());
            Ok(Type::new(compute, shape))
        }
        Op::Splice { .. } => {
            let (x, ids, table) = (first()?, inputs[1], inputs[2]);
            if ids.shape[..] != x.shape[..x.shape.len().saturating_sub(1)] {
                return Err(format!("ids are {ids} but the embeddings are {x}"));
            }
            if table.shape.len() != 2 || table.shape.last() != x.shape.last() {
                return Err(format!("the prompt table is {table} but the embeddings are {x}"));
            }
            Ok(x.clone())
        }
        Op::Broadcast { weight } => {
            let batch = first()?.shape.first().copied().ok_or("a scalar has no batch")?;
            let shape: Vec<Dim> = std::iter::once(batch).chain(weight.shape().into_iter().map(Dim::Fixed)).collect();
            Ok(Type::new(compute, shape))
        }
        Op::Concat { axis } => infer_concat(*axis, inputs),
        Op::Slice { axis, start, end } => {
            let mut ty = first()?.clone();
            match ty.shape.get_mut(*axis) {
                Some(Dim::Fixed(size)) if start < end && *end <= *size => *size = end - start,
                _ => return Err(format!("cannot take {start}..{end} of axis {axis} of {ty}")),
            }
            Ok(ty)
        }
        Op::Pad { axis, after } => {
            let mut ty = first()?.clone();
            match ty.shape.get_mut(*axis) {
                Some(Dim::Fixed(size)) if *after > 0 => *size = size.checked_add(*after).ok_or("grows too large")?,
                _ => return Err(format!("cannot put {after} zeros behind axis {axis} of {ty}")),
            }
            Ok(ty)
        }
        Op::Roll { axis, by } => {
            let x = first()?;
            match x.shape.get(*axis) {
                Some(Dim::Fixed(size)) if (1..*size).contains(by) => Ok(x.clone()),
                _ => Err(format!("cannot roll axis {axis} of {x} by {by}")),
            }
        }
        Op::Reshape { shape } => {
            let x = first()?;
            if volume(&x.shape) != volume(shape) {
                return Err(format!("cannot reshape {x} to {}", Type::new(x.dtype, shape.clone())));
            }
            Ok(Type::new(x.dtype, shape.clone()))
        }
        Op::Transpose { permutation } => {
            let x = first()?;
            let mut sorted = permutation.clone();
            sorted.sort_unstable();
            if sorted != (0..x.shape.len()).collect::<Vec<_>>() {
                return Err(format!("{permutation:?} is no permutation of the axes of {x}"));
            }
            Ok(Type::new(x.dtype, permutation.iter().map(|&axis| x.shape[axis]).collect::<Vec<_>>()))
        }
        Op::LastToken => {
            let x = first()?;
            match x.shape[..] {
                [batch, _, hidden] if inputs[1].shape == [batch] => Ok(Type::new(x.dtype, [batch, hidden])),
                _ => Err(format!("cannot pick rows {} of {x}", inputs[1])),
            }
        }
        Op::AllGather { ranks } => {
            let (mut ty, width) = (first()?.clone(), last_fixed(first()?)?);
            ty.shape.pop();
            ty.shape.push(width.checked_mul(*ranks).ok_or("grows too large")?.into());
            Ok(ty)
        }
        Op::Cast { dtype } => Ok(Type::new(*dtype, first()?.shape.clone())),
    }
}

fn check_count(op: &Op, found: usize) -> Result<(), Misfit> {
    let wanted = match op {
        Op::Input => 0..=0,
        Op::Binary { .. } | Op::LastToken => 2..=2,
        Op::Splice { .. } => 3..=3,
        Op::Concat { .. } => 1..=usize::MAX,
        Op::QuantizeInput { .. } => 1..=2,
        Op::Attention(attention) => {
            let count = 3 + attention.extra_inputs();
            count..=count
        }
        _ => 1..=1,
    };
    if wanted.contains(&found) { Ok(()) } else { Err(format!("takes {} inputs, found {found}", wanted.start())) }
}

fn matrix(weight: &Weight) -> Result<(usize, usize), Misfit> {
    match weight.shape()[..] {
        [out, width] => Ok((out, width)),
        ref shape => Err(format!("weight `{}` is {shape:?}, a matrix was wanted", weight.key())),
    }
}

fn last_fixed(ty: &Type) -> Result<usize, Misfit> {
    ty.shape.last().and_then(|dim| dim.fixed()).ok_or_else(|| format!("the last dimension of {ty} is not fixed"))
}

fn ends_with(ty: &Type, weight: &Weight) -> Result<(), Misfit> {
    let shape: Vec<Dim> = weight.shape().into_iter().map(Dim::Fixed).collect();
    let ones = shape.iter().take_while(|&&dim| dim == Dim::Fixed(1)).count();
    if shape.len() <= ty.shape.len() && ty.shape.ends_with(&shape[ones..]) {
        Ok(())
    } else {
        Err(format!("weight `{}` is {:?} but the input is {ty}", weight.key(), weight.shape()))
    }
}

/// The fixed sizes multiplied, and the named dimensions sorted: equal for shapes that hold equally many elements.
fn volume(shape: &[Dim]) -> (usize, Vec<Dim>) {
    let fixed = shape.iter().filter_map(|dim| dim.fixed()).product();
    let mut named: Vec<Dim> = shape.iter().copied().filter(|dim| dim.fixed().is_none()).collect();
    named.sort_by_key(Dim::to_string);
    (fixed, named)
}

fn infer_attention(attention: &Attention, inputs: &[&Type]) -> Result<Type, Misfit> {
    let Attention { heads, kv_heads, head_dim, .. } = *attention;
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(format!("{heads} query heads do not divide by {kv_heads} key/value heads"));
    }
    let (query, key, value) = (inputs[0], inputs[1], inputs[2]);
    let width = |ty: &Type, wanted: usize, what: &str| {
        if ty.shape.len() == 3 && ty.shape[2] == Dim::Fixed(wanted) && ty.shape[0] == query.shape[0] {
            Ok(())
        } else {
            Err(format!("the {what} is {ty}, wanted width {wanted}"))
        }
    };
    width(query, heads * head_dim, "query")?;
    width(key, kv_heads * head_dim, "key")?;
    width(value, kv_heads * head_dim, "value")?;
    if key.shape != value.shape {
        return Err(format!("key {key} and value {value} differ"));
    }
    if attention.rope.is_some() && !head_dim.is_multiple_of(2) {
        return Err(format!("rotary embedding needs an even head size, found {head_dim}"));
    }
    if (attention.cache.is_some() || attention.mask == Mask::Causal) && key.shape[1] != query.shape[1] {
        return Err(format!("self-attention needs as many keys as queries, found {key} and {query}"));
    }
    if attention.key_lengths && attention.cache.is_some() {
        return Err("a cache has lengths of its own".into());
    }
    if attention.int8_cache && attention.cache.is_none() {
        return Err("keys and values that are not kept cannot be kept as INT8".into());
    }
    if let Some(bias) = &attention.relative_bias {
        let shape = bias.weight.shape();
        if shape != [bias.buckets, heads] || !bias.is_sound() {
            return Err(format!(
                "relative bias `{}` is {shape:?}, wanted [{}, {heads}]",
                bias.weight.key(),
                bias.buckets
            ));
        }
    }
    if let Some(bias) = &attention.window_bias {
        let plain = attention.extra_inputs() == 0 && attention.mask == Mask::None && attention.relative_bias.is_none();
        let all = |ty: &Type| ty.shape[1] == Dim::Fixed(bias.places());
        if !bias.is_sound(heads) || !plain || !all(query) || !all(key) {
            return Err(format!(
                "window bias `{}` {:?} does not fit {heads} heads in {:?} windows of side {} over {query}",
                bias.weight.key(),
                bias.weight.shape(),
                bias.grid,
                bias.side
            ));
        }
    }
    for lengths in &inputs[3..] {
        if lengths.dtype != DType::Int32 {
            return Err(format!("positions and lengths are int32, found {lengths}"));
        }
    }
    Ok(query.clone())
}

fn infer_conv(weight: &Weight, stride: usize, x: &Type) -> Result<Type, Misfit> {
    let shape = weight.shape();
    let ([out, channels, height, width], [batch, in_channels, rows, columns]) = (&shape[..], &x.shape[..]) else {
        return Err(format!("weight `{}` is {shape:?} and the input {x}, both want 4 dimensions", weight.key()));
    };
    let (Dim::Fixed(rows), Dim::Fixed(columns)) = (rows, columns) else {
        return Err(format!("the picture size of {x} is not fixed"));
    };
    if *in_channels != Dim::Fixed(*channels) || rows < height || columns < width || stride == 0 {
        return Err(format!("weight `{}` is {shape:?} but the input is {x}", weight.key()));
    }
    let steps = |size: usize, kernel: usize| Dim::Fixed((size - kernel) / stride + 1);
    Ok(Type::new(x.dtype, [*batch, Dim::Fixed(*out), steps(*rows, *height), steps(*columns, *width)]))
}

fn infer_concat(axis: usize, inputs: &[&Type]) -> Result<Type, Misfit> {
    let mut ty = inputs.first().copied().cloned().ok_or("has no input")?;
    let mut total = 0;
    for input in inputs {
        let size = input.shape.get(axis).and_then(|dim| dim.fixed());
        let size = size.ok_or_else(|| format!("axis {axis} of {input} is not fixed"))?;
        total += size;
        let mut other = (*input).clone();
        other.shape[axis] = ty.shape[axis];
        if other != ty {
            return Err(format!("cannot join {ty} and {input} along axis {axis}"));
        }
    }
    ty.shape[axis] = total.into();
    Ok(ty)
}
