//! JSON schema of a configuration file, so that editors complete it.

use serde_json::{Map, Value, json};

use super::keys::sections;
use super::{Job, SLOTS};

/// JSON schema of configuration files of both jobs.
pub fn schema() -> Value {
    let mut file = table("Configuration of a run of lowrank.");
    for job in [Job::Pretrain, Job::Finetune] {
        for section in sections(job) {
            let place = below(&mut file, section.name);
            place["description"] = section.help.clone().into();
            for key in section.keys {
                let mut place = &mut file;
                let mut names: Vec<&str> = key.name.split('.').collect();
                let last = names.pop().unwrap_or_default();
                for name in names {
                    place = below(place, name);
                }
                place["properties"][last] = if key.is_options() { json!({}) } else { value(&key.option.schema()) };
            }
        }
    }
    for slot in SLOTS {
        let place = slot.section.split('.').fold(&mut file, |place, name| below(place, name));
        place["properties"]["name"]["examples"] = slot.names().into();
        let of_each = slot.names().into_iter().filter_map(|name| {
            let options = slot.options(name)?.schema();
            Some(json!({
                "if": { "properties": { "name": { "const": name } }, "required": ["name"] },
                "then": { "properties": { "options": options } },
            }))
        });
        place["allOf"] = of_each.collect();
    }
    file["$schema"] = "https://json-schema.org/draft/2020-12/schema".into();
    file
}

fn table(description: &str) -> Value {
    json!({ "type": "object", "description": description, "additionalProperties": false, "properties": {} })
}

/// Table with this name inside another.
fn below<'a>(place: &'a mut Value, name: &str) -> &'a mut Value {
    if !place["properties"][name].is_object() {
        place["properties"][name] = table("");
    }
    &mut place["properties"][name]
}

/// Extends the schema of a list to accept a single value.
fn value(schema: &Value) -> Value {
    match (schema["type"] == "array", schema.as_object()) {
        (true, Some(object)) => {
            let about: Map<String, Value> = object
                .iter()
                .filter(|(key, _)| ["description", "default"].contains(&key.as_str()))
                .map(|(key, of)| (key.clone(), of.clone()))
                .collect();
            let mut either = Value::Object(about);
            either["anyOf"] = json!([schema["items"], { "type": "array", "items": schema["items"] }]);
            either
        }
        _ => schema.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_options_of_methods_have_types_ranges_and_help() {
        let schema = schema();
        let batch = &schema["properties"]["train"]["properties"]["batch"];
        assert_eq!((&batch["minimum"], &batch["default"]), (&json!(1), &json!(4)));
        let optimizer = &schema["properties"]["optimizer"];
        let galore = optimizer["allOf"]
            .as_array()
            .unwrap()
            .iter()
            .find(|one| one["if"]["properties"]["name"]["const"] == "galore");
        let rank = &galore.unwrap()["then"]["properties"]["options"]["properties"]["rank"];
        assert_eq!(rank["minimum"], json!(1));
        assert!(rank["description"].as_str().unwrap().starts_with("Rank"));
        assert_eq!(
            schema["properties"]["model"]["properties"]["parameterization"]["additionalProperties"],
            json!(false)
        );
        assert!(schema["properties"]["adapter"]["properties"]["name"].is_object());
    }
}
