//! Human-readable numbers.

/// Formats bytes in binary units.
pub fn bytes(value: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut scaled = value as f64;
    let mut unit = 0;
    while scaled >= 1024.0 && unit + 1 < units.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{value} B"),
        _ if scaled < 10.0 => format!("{scaled:.2} {}", units[unit]),
        _ if scaled < 100.0 => format!("{scaled:.1} {}", units[unit]),
        _ => format!("{scaled:.0} {}", units[unit]),
    }
}

/// Parses bytes from a text such as `8GiB`, `1.5 GiB`, `900MB` or `4096`; none for invalid texts. K, M, G and T alone
/// count as binary.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1000 * 1000,
        "gb" => 1000 * 1000 * 1000,
        "tb" => 1000 * 1000 * 1000 * 1000,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        _ => return None,
    };
    let value = number.trim().parse::<f64>().ok()? * factor as f64;
    (value >= 1.0 && value < 2f64.powi(60)).then_some(value as u64)
}

/// Formats integers with thousands separators.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Formats seconds as hours, minutes and seconds.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_three_digits_and_a_unit() {
        assert_eq!(
            [bytes(0), bytes(1023), bytes(1536), bytes(50 << 20), bytes(700 << 30)],
            ["0 B", "1023 B", "1.50 KiB", "50.0 MiB", "700 GiB"]
        );
        for (text, value) in
            [("8GiB", 8 << 30), ("1.5 g", 3 << 29), ("900MB", 900_000_000), ("4096", 4096), ("2kb", 2000)]
        {
            assert_eq!(parse_bytes(text), Some(value), "{text}");
        }
        for text in ["", "GiB", "8 gigs", "-1G", "0", "nan", "inf", "1e30"] {
            assert_eq!(parse_bytes(text), None, "{text}");
        }
        assert_eq!([count(0), count(999), count(1000), count(1234567)], ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([duration(59.4), duration(61.0), duration(3700.0)], ["59 s", "1 min 01 s", "1 h 01 min"]);
    }
}
