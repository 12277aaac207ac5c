//! Names of the parameters of vision transformers in files, which are those of `transformers` before version 5.

/// Beginning of the path of a block in the module, and in files.
const BLOCKS: (&str, &str) = ("vit.layers.", "vit.encoder.layer.");
/// Layers of a block in the module, and in files.
const LAYERS: [(&str, &str); 6] = [
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
];

/// The name in a model file of the parameter of a [`VisionTransformer`](crate::VisionTransformer) with this path, or of a part of it, such as
/// a layer.
pub fn vit_file_name(path: &str) -> String {
    renamed(path, BLOCKS, LAYERS.into_iter())
}

/// The path in the module of a parameter with this name in a model file; other names are returned as they are.
pub fn vit_module_name(name: &str) -> String {
    let turned = |(module, file)| (file, module);
    renamed(name, turned(BLOCKS), LAYERS.into_iter().map(turned))
}

fn renamed<'a>(path: &str, blocks: (&str, &str), mut layers: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let Some((number, inner)) = path.strip_prefix(blocks.0).and_then(|rest| rest.split_once('.')) else {
        return path.to_string();
    };
    let other = layers.find_map(|(from, to)| {
        let rest = inner.strip_prefix(from)?;
        (rest.is_empty() || rest.starts_with('.')).then(|| format!("{to}{rest}"))
    });
    format!("{}{number}.{}", blocks.1, other.as_deref().unwrap_or(inner))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_there_and_back() {
        for (module, file) in [
            ("vit.layers.3.attention.q_proj.weight", "vit.encoder.layer.3.attention.attention.query.weight"),
            ("vit.layers.10.attention.o_proj.bias", "vit.encoder.layer.10.attention.output.dense.bias"),
            ("vit.layers.0.mlp.fc1", "vit.encoder.layer.0.intermediate.dense"),
            ("vit.layers.0.mlp.fc2.weight", "vit.encoder.layer.0.output.dense.weight"),
            ("vit.layers.0.layernorm_before.weight", "vit.encoder.layer.0.layernorm_before.weight"),
            ("vit.embeddings.cls_token", "vit.embeddings.cls_token"),
            ("classifier.weight", "classifier.weight"),
        ] {
            assert_eq!((vit_file_name(module).as_str(), vit_module_name(file).as_str()), (file, module));
            assert_eq!(vit_module_name(module), module);
        }
    }
}
