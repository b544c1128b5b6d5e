// Which rows of swacompile.target's CPU table this machine runs.
#pragma once

#include <string>

namespace swacompile {

enum class Support : int { Unknown = -1, No = 0, Yes = 1 };

// Whether this CPU and its operating system run code of a row of swacompile.target.
Support supports(const std::string& instruction_set);

// The names of all rows that run here, best first, for messages: "x86_64_v3, x86_64_v2".
std::string supported_here();

}  // namespace swacompile
