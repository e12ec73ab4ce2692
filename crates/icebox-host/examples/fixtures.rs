//! Makes what the guests of tests are made of, unless it is there, and prints where it is: for the test host, which has
//! neither a network to fetch it from nor a compiler.

use std::error::Error;

use icebox_host::guest_image::fixture;
use serde_json::json;

fn main() -> Result<(), Box<dyn Error>> {
    let kernel = fixture::kernel()?.digest().to_string();
    let made = json!({
        "agent": fixture::agent()?,
        "cache": fixture::cache_dir(),
        // What a test needs of the cache.
        "cached": [fixture::cache_dir().join("kernels").join(kernel), fixture::debian_image()?],
    });
    println!("{made}");
    Ok(())
}
