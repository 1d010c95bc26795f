# Model matrices of lme4::lFormula for many formulas, with the table they were made from.
# Run: Rscript design.R > design.json   (R 4.2.2, lme4 1.1-31)
# A matrix M is stored as k %*% M with k = (1:n)/n; names and levels are stored in full.
suppressMessages({library(lme4); library(jsonlite); library(splines)})
set.seed(1)
d <- expand.grid(a=c("p","q","r"), b=c("u","v"), c=c("x","y"), r=1:5)
n <- nrow(d)
d$x <- round(rnorm(n), 3)
d$z <- round(rnorm(n), 3)
d$y <- round(rnorm(n), 3)
d$t <- round(runif(n, 1, 9), 2)
steps <- c("lo", "mid", "hi", "top", "max")
d$o <- factor(steps[d$r], levels=steps, ordered=TRUE)
d$flag <- d$x > 0
d$g <- factor(sample(8, n, TRUE))
d$num <- d$r/10
d$txt <- sample(c("b", "a", "k"), n, TRUE)
d <- d[sample(n),]
rownames(d) <- NULL
d[["my x"]] <- d$x
k <- seq_len(n)/n
center <- function(x) x - mean(x)
formulas <- c(
  "y ~ a + b %in% a + (1|g)",
  "y ~ x + (1|a/b/c)",
  "y ~ x*a + (a||g)",
  "y ~ a:b + (x||a/b)",
  "y ~ 0 + a:o + (1|o:a)",
  "y ~ I(x/2) + I(-x+1e5*2) + log(abs(x), base=2)+ (0+a|g)",
  "y ~ flag*a + I(x>0) + (flag|g)",
  "y ~ (1|g) + x*(a+b)^2 - a:b",
  "y ~ a*o+ 0 + (1|g)",
  "y ~ x:a + a + (0+a:b|g)",
  "y ~ `my x`*a + (`my x`|g)",
  "y ~ scale(x) + (1|g)",
  "y ~ 0 + x + a + b+ (1|g)",
  "y ~ a:x + b:x + (1|g)",
  "y ~ 0 + x:a + b + (1|g)",
  "y ~ as.factor(r) + r + (1|g)",
  "y ~ x - x + z+ (1|g)",
  "y ~ poly(x,3) + (1|g)",
  "y ~ poly(t,2,raw=TRUE)*a + (1|g)",
  "y ~ bs(t,df=5) + (1|g)",
  "y ~ ns(t,df=3) + (ns(t,df=2)|g)",
  "y ~ bs(t, knots=c(3,5), degree=2, intercept=TRUE) - 1 + (1|g)",
  "y ~ ns(t,knots=c(3,6), Boundary.knots=c(2,8),intercept=TRUE)+0 + (1|g)",
  "y ~ scale(x, scale=FALSE) + scale(z, center=FALSE) + (1|g)",
  "log(t) ~ sqrt(t)*exp(x) + sin(2*pi*x) + (1|g)",
  "sqrt(t)+1 ~ a/x + (1|g)",
  "y ~ (a+b+c)^3 + (x|g)",
  "y ~ (a+b+x)^2 - x:a + (x*z|g)",
  "y ~ a/b/c + (1|g)",
  "y ~ (a+b)/x + (1|g)",
  "y ~ factor(num)*a + (1|g)",
  "y ~ txt + (1|txt) + (1|r)",
  "y ~ o + (o|g)",
  "y ~ o:x + (0+o|g)",
  "y ~ a*flag*x + (1|flag:g)",
  "y ~ 0 + flag + x:flag + (1|g)",
  "y ~ x + I(2*x) + a + z + (1|g)",
  "y ~ a*b + I(a == \"p\") + (1|g)",
  "y ~ 0 + a + b + c + (0+a+b|g)",
  "y ~ x + z + x:z + offset(t) + (1|g)",
  "y ~ offset(log(t)) + offset(x) + (1|g)",
  "y ~ b*x + (1|b:g) + (0+x|g)",
  "y ~ x %in% a + (1|g)",
  "y ~ pmin(x,z) + ifelse(x>0,1,z) + round(x,1) + x%%2 + x%/%2 + (1|g)",
  "y ~ -1 + x + (1|g)",
  "y ~ 1 + (1|g)",
  "y ~ x + 0 + 1 + (1|g)",
  "y ~ relevel(a, ref=\"q\")*x + (1|g)",
  "y ~ I(x^2) + I(x**2*1e-7) + (x + I(x^2)|g)",
  "y ~ a:b:c + a:b + (1|g)",
  "y ~ x:z + x + (x:a|g)",
  "y ~ factor(r, labels=c(\"A\",\"B\",\"C\",\"D\",\"E\")) + (1|g)",
  "y ~ z:x:a + (1|g)",
  "y ~ 0 + x + x:a + b:a + (1|g)",
  "y ~ 0+o+a + (1|g)",
  "y ~ log1p(t) + x^2 + (1|g)",
  "y~ (x+z)*(a+b) - z:b + (x:z||g)",
  "y ~ center(x) + (1|a:b:g)",
  "y~x+(1|a:(b:g))"
)
ctl <- lmerControl(check.nobs.vs.nRE="ignore", check.nobs.vs.nlev="ignore",
                   check.nlev.gtr.1="ignore", check.rankX="silent.drop.cols")
mean_by_k <- function(M) I(as.numeric(k %*% M))
optional <- function(v) if (is.null(v)) NULL else sum(k*v)
raw_z <- function(rt, i, codes) {  # columns before they are spread over the levels
  Zt <- as.matrix(rt$Ztlist[[i]])
  S <- length(rt$cnms[[i]])
  Z <- sapply(seq_len(ncol(Zt)), function(r) Zt[(codes[r] - 1)*S + seq_len(S), r])
  matrix(Z, ncol=S, byrow=TRUE)
}
one <- function(f) {
  l <- lFormula(as.formula(f), d, control=ctl)
  rt <- l$reTrms
  factors <- rt$flist[attr(rt$flist, "assign")]
  list(formula=f, names=I(colnames(l$X)), X=mean_by_k(l$X),
       y=sum(k*model.response(l$fr)), offset=optional(model.offset(l$fr)),
       groups=I(names(rt$cnms)), columns=lapply(unname(rt$cnms), I),
       levels=lapply(unname(factors), function(v) I(levels(v))),
       codes=I(sapply(unname(factors), function(v) sum(k*(as.integer(v) - 1)))),
       z=lapply(seq_along(factors), function(i) mean_by_k(raw_z(rt, i, as.integer(factors[[i]])))))
}
coded <- function(contrast) {
  X <- model.matrix(~ a*b + o, d, contrasts.arg=list(a=contrast, o=contrast))
  list(contrast=contrast, names=I(colnames(X)), X=mean_by_k(X))
}
contrasts <- lapply(c("contr.sum", "contr.helmert", "contr.poly", "contr.treatment"), coded)
cat(toJSON(list(data=d, formulas=lapply(formulas, one), contrasts=contrasts),
           digits=I(15), null="null", auto_unbox=TRUE, dataframe="columns"))
