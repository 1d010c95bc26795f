# lme4 through Rscript: lme4.R PROBLEM.dcf RUNS. Prepared: lFormula(), the model matrices.
suppressMessages(library(lme4))
args <- commandArgs(TRUE)
problem <- read.dcf(args[1])[1, ]
runs <- as.integer(args[2])
data <- read.csv(problem[["csv"]], stringsAsFactors = TRUE)
for (name in strsplit(problem[["groups"]], ",")[[1]]) data[[name]] <- factor(data[[name]])
for (name in strsplit(problem[["categories"]], ",")[[1]]) data[[name]] <- factor(data[[name]])
reml <- problem[["method"]] == "REML"

peak <- function() {
  status <- readLines("/proc/self/status")
  as.numeric(gsub("[^0-9]", "", grep("^VmHWM", status, value = TRUE))) * 1024 / 1e6
}
fit <- function() {
  lmer(as.formula(problem[["formula"]]), data, REML = reml,
       control = lmerControl(calc.derivs = FALSE))
}
seconds <- function(call) {
  began <- proc.time()[["elapsed"]]
  value <- call()
  list(time = proc.time()[["elapsed"]] - began, value = value)
}
# the elapsed time of R has milliseconds: short calls are timed by twenty
repeated <- function(call, runs) {
  first <- seconds(call)
  each <- if (first$time < 0.5) 20 else 1
  if (first$time > 30) {
    return(sprintf('{"first": %.6f, "warm": %.6f, "runs": 1, "objective": %.10f}',
                   first$time, first$time, -2 * as.numeric(logLik(first$value))))
  }
  many <- function() for (k in seq_len(each)) call()
  times <- sapply(seq_len(runs), function(i) seconds(many)$time / each)
  sprintf('{"first": %.6f, "warm": %.6f, "runs": %d, "objective": %.10f}',
          first$time, median(times), runs, -2 * as.numeric(logLik(first$value)))
}

options(warn = -1)
loaded <- peak()
if (runs == 0) { # the process is what is timed
  cat(sprintf('\n{"objective": %.10f}\n', -2 * as.numeric(logLik(fit()))))
  quit(save = "no")
}
frame <- repeated(fit, runs)
memory <- peak()
parts <- lFormula(as.formula(problem[["formula"]]), data, REML = reml)
from_parts <- function() {
  criterion <- do.call(mkLmerDevfun, parts)
  best <- optimizeLmer(criterion, calc.derivs = FALSE)
  mkMerMod(environment(criterion), best, parts$reTrms, fr = parts$fr)
}
built <- ""
if (!grepl('"runs": 1,', frame, fixed = TRUE) || runs == 1) {
  built <- sprintf('"built": %s, ', repeated(from_parts, runs))
}
cat(sprintf('\n{"frame": %s, %s"peak_mb": %.1f, "loaded_mb": %.1f}\n',
            frame, built, memory, loaded))
