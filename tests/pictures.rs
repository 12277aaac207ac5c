//! Pictures for runs of the program.

use lowrank_train::data::images::Picture;

use crate::program::Workshop;

/// Pictures of three or more classes, which differ in their colour, in folders of the classes.
pub fn draw(shop: &Workshop, folder: &str, classes: &[&str], each: usize) {
    for (class, name) in classes.iter().enumerate() {
        let dir = shop.path(folder).join(name);
        std::fs::create_dir_all(&dir).expect("a folder");
        for number in 0..each {
            let value = |i: usize| {
                let noise = (i * i + 31 * i + 17 * number) % 90;
                (if i % 3 == class % 3 { 160 } else { 40 + 50 * (class / 3) } + noise) as u8
            };
            let picture = Picture { width: 20, height: 24, pixels: (0..3 * 20 * 24).map(value).collect() };
            std::fs::write(dir.join(format!("{number}.png")), picture.png().expect("a picture")).expect("a file");
        }
    }
}

/// Arguments of a run on images that takes a second.
pub fn tiny<'a>(command: &'a str, model: &'a str, out: &'a str, data: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec![command, "--quiet", "--model", model, "--out", out, "--data", data, "--batch", "6"];
    for setting in ["schedule.warmup_steps=2", "data.validation_fraction=0.2", "eval.every=4", "optimizer.lr=0.01"] {
        args.extend(["--set", setting]);
    }
    if command == "pretrain" && model == "vit-micro" {
        for setting in [
            "model.hidden_size=16",
            "model.intermediate_size=32",
            "model.num_hidden_layers=2",
            "model.num_attention_heads=2",
        ] {
            args.extend(["--set", setting]);
        }
    }
    args.extend(more);
    args
}
